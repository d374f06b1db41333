//! A folder with a tiny model of random weights, some data and a recipe, and the program run in it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use peft::adapter::torch_random::Generator;
use serde_json::Value;

const RECIPE: &str = r#"
task = "finetune"
output = "run"
model = { source = "model", dtype = "f32" }
adapter = { rank = 4, dropout = 0.1 }
data = { train = [{ path = "data.jsonl" }], eval_share = 0.2, max_length = 32 }
train = { steps = 6, batch_size = 1, eval_every = 3, save_every = 2, keep = 2, learning_rate = 1e-2 }
"#;

/// The folder.
pub(crate) struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::with(DType::F32)
    }

    /// With a model that is stored in `dtype`.
    pub(crate) fn with(dtype: DType) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        random_model(&place.path("model"), dtype);
        let records: String = (0..24)
            .map(|n| format!("{{\"prompt\": \"Where is kite {n}?\", \"completion\": \" In box {n}.\"}}\n"))
            .collect();
        fs::write(place.path("data.jsonl"), records).unwrap();
        fs::write(place.path("recipe.toml"), RECIPE).unwrap();
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peft"));
        command.args(arguments).current_dir(self.folder.path()).env("NO_COLOR", "1");
        // What is measured once per machine is nothing of the user's here.
        command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
        command
    }

    /// What a command that succeeds writes to stdout and stderr.
    pub(crate) fn run(&self, arguments: &[&str]) -> (String, String) {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
        assert!(status.success(), "peft {}: {status}\n{stderr}", arguments.join(" "));
        (stdout, stderr)
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.run(arguments).0).unwrap()
    }

    pub(crate) fn names_in(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// The bundled tiny model with weights of chance.
fn random_model(folder: &Path, dtype: DType) {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-llama");
    fs::create_dir(folder).unwrap();
    for entry in fs::read_dir(&bundled).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "safetensors") {
            fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
        }
    }
    let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, width, head_dim) = (size("hidden_size"), size("intermediate_size"), size("head_dim"));
    let (q, kv) = (size("num_attention_heads") * head_dim, size("num_key_value_heads") * head_dim);
    let mut generator = Generator::new(7);
    let mut random = |rows: usize, columns: usize| {
        let mut values = vec![0.0; rows * columns];
        generator.normal(&mut values, 0.0, 0.06);
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    };
    let ones = || Tensor::ones(hidden, dtype, &Device::Cpu).unwrap();
    let mut tensors = HashMap::from([
        ("model.embed_tokens.weight".to_string(), random(size("vocab_size"), hidden)),
        ("model.norm.weight".to_string(), ones()),
    ]);
    for layer in 0..size("num_hidden_layers") {
        for (name, tensor) in [
            ("input_layernorm", ones()),
            ("post_attention_layernorm", ones()),
            ("self_attn.q_proj", random(q, hidden)),
            ("self_attn.k_proj", random(kv, hidden)),
            ("self_attn.v_proj", random(kv, hidden)),
            ("self_attn.o_proj", random(hidden, q)),
            ("mlp.gate_proj", random(width, hidden)),
            ("mlp.up_proj", random(width, hidden)),
            ("mlp.down_proj", random(hidden, width)),
        ] {
            tensors.insert(format!("model.layers.{layer}.{name}.weight"), tensor);
        }
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

/// Every file below a folder with its bytes, and every folder, named from there.
pub(crate) type Tree = BTreeMap<String, Option<Vec<u8>>>;

/// What is in a folder now; nothing where there is none.
pub(crate) fn tree(folder: &Path) -> Tree {
    fn add(root: &Path, folder: &Path, tree: &mut Tree) {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_string();
            if path.is_dir() {
                tree.insert(name, None);
                add(root, &path, tree);
            } else {
                tree.insert(name, Some(fs::read(&path).unwrap()));
            }
        }
    }
    let mut found = Tree::new();
    add(folder, folder, &mut found);
    found
}

/// Fails with the names of what differs.
pub(crate) fn assert_same(found: &Tree, expected: &Tree) {
    let names: BTreeSet<&String> = found.keys().chain(expected.keys()).collect();
    let differing: Vec<&String> =
        names.into_iter().filter(|name| found.get(*name) != expected.get(*name)).collect();
    assert!(differing.is_empty(), "not the same: {differing:?}");
}

/// Exit status and stderr, with the folder of the place left out.
pub(crate) fn refusal(place: &Place, arguments: &[&str]) -> String {
    told(place, &place.command(arguments).output().unwrap())
}

/// As [`refusal`], of a command that has run.
pub(crate) fn told(place: &Place, output: &Output) -> String {
    let status = output.status.code().map_or("killed".to_string(), |code| code.to_string());
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    let stderr: Vec<&str> = stderr.lines().map(str::trim_end).collect();
    format!("exit {status}\n{}", stderr.join("\n")).replace(place.folder.path().to_str().unwrap(), "[place]")
}
