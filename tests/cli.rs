use std::io::Read;
use std::process::{Command, Output, Stdio};

/// `peft` in the repository, without colours.
fn peft(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peft"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).env("NO_COLOR", "1");
    command
}

/// Exit status, stdout and stderr of a command, as one text.
fn told(arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = peft(arguments).output().unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    let status = status.code().map_or("killed".to_string(), |code| code.to_string());
    let mut text = format!("exit {status}\n");
    for (name, stream) in [("stdout", stdout), ("stderr", stderr)] {
        if !stream.is_empty() {
            let lines: Vec<&str> = stream.lines().map(str::trim_end).collect();
            text += &format!("----- {name}\n{}\n", lines.join("\n"));
        }
    }
    text
}

#[test]
fn help() {
    insta::assert_snapshot!(told(&["--help"]), @"
    exit 0
    ----- stdout
    Fine-tunes pretrained language models with small adapters, and folds the adapters back

    Usage: peft [OPTIONS] <COMMAND>

    Commands:
      finetune     Train an adapter, or all weights, as a recipe says
      check        Say everything about a recipe that can be known before training
      merge        Fold adapters into a model's weights
      upcycle      Turn a dense model into a mixture of experts, as a recipe says
      generate     Continue a prompt
      chat         Talk to a model
      eval         Measure a model on a data file
      inspect      Describe a model, an adapter, a data file or a run
      recipes      Show recipes and what they can say, or convert the configuration of another tool
      completions  Print a script that completes commands and flags in a shell
      man          Write a manual page for each command
      help         Print this message or the help of the given subcommand(s)

    Options:
      -h, --help
              Print help (see a summary with '-h')

      -V, --version
              Print version

    Global options:
          --log <FORM>
              How progress is told on stderr

              Possible values:
              - auto:   A live bar on a terminal, lines elsewhere
              - lines:  Plain lines; for the steps about a hundred, and one a minute at least
              - json:   Every event as a line of JSON
              - silent: Warnings and errors only

              [default: auto]

          --color <WHEN>
              Whether messages are coloured

              Possible values:
              - auto:   On a terminal, unless `NO_COLOR` is set
              - always: Always
              - never:  Never

              [default: auto]

          --threads <N>
              How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    ");
    assert_eq!(told(&[]).replace("exit 2\n----- stderr", "exit 0\n----- stdout"), told(&["-h"]));
}

#[test]
fn help_of_finetune() {
    insta::assert_snapshot!(told(&["finetune", "--help"]), @"
    exit 0
    ----- stdout
    Train an adapter, or all weights, as a recipe says

    Writes a run directory that Hugging Face PEFT loads as an adapter. Ctrl-C and SIGTERM save a checkpoint first; `--resume` goes on from the newest one.

    Usage: peft finetune [OPTIONS] <RECIPE>

    Arguments:
      <RECIPE>
              A recipe file, or the name of a built-in recipe

    Options:
          --set <KEY=VALUE>
              Lay a value over the recipe: `--set train.learning_rate=1e-4`

              The value is TOML; a bare word is taken as a string.

          --output <DIR>
              The run directory, instead of the recipe's `output`

          --resume
              Go on from the newest checkpoint in the run directory

      -h, --help
              Print help (see a summary with '-h')

    Global options:
          --log <FORM>
              How progress is told on stderr

              Possible values:
              - auto:   A live bar on a terminal, lines elsewhere
              - lines:  Plain lines; for the steps about a hundred, and one a minute at least
              - json:   Every event as a line of JSON
              - silent: Warnings and errors only

              [default: auto]

          --color <WHEN>
              Whether messages are coloured

              Possible values:
              - auto:   On a terminal, unless `NO_COLOR` is set
              - always: Always
              - never:  Never

              [default: auto]

          --threads <N>
              How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    ");
}

#[test]
fn help_of_check() {
    insta::assert_snapshot!(told(&["check", "-h"]), @"
    exit 0
    ----- stdout
    Say everything about a recipe that can be known before training

    Usage: peft check [OPTIONS] <RECIPE>

    Arguments:
      <RECIPE>  A recipe file, or the name of a built-in recipe

    Options:
          --set <KEY=VALUE>  Lay a value over the recipe: `--set train.learning_rate=1e-4`
          --json             Print one JSON document
      -h, --help             Print help (see more with '--help')

    Global options:
          --log <FORM>    How progress is told on stderr [default: auto] [possible values: auto, lines, json, silent]
          --color <WHEN>  Whether messages are coloured [default: auto] [possible values: auto, always, never]
          --threads <N>   How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    ");
}

#[test]
fn help_of_merge() {
    insta::assert_snapshot!(told(&["merge", "-h"]), @"
    exit 0
    ----- stdout
    Fold adapters into a model's weights

    Usage: peft merge [OPTIONS] --model <MODEL> --adapter <DIR> --output <DIR>

    Options:
          --model <MODEL>  A folder, a `.gguf` file or a Hub id (`org/name[@revision]`)
          --adapter <DIR>  The folder of an adapter; given again, the sum of all is folded in
          --output <DIR>   The folder to write; must not exist yet
          --dtype <DTYPE>  The number format of the written weights [default: each tensor keeps its own] [possible values: f32, bf16, f16]
          --data <FILE>    Print the loss of base, adapter and merged model on the records of this file
      -h, --help           Print help (see more with '--help')

    Global options:
          --log <FORM>    How progress is told on stderr [default: auto] [possible values: auto, lines, json, silent]
          --color <WHEN>  Whether messages are coloured [default: auto] [possible values: auto, always, never]
          --threads <N>   How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    ");
}

#[test]
fn help_of_upcycle() {
    insta::assert_snapshot!(told(&["upcycle", "-h"]), @"
    exit 0
    ----- stdout
    Turn a dense model into a mixture of experts, as a recipe says

    Usage: peft upcycle [OPTIONS] <RECIPE>

    Arguments:
      <RECIPE>  A recipe file, or the name of a built-in recipe

    Options:
          --set <KEY=VALUE>  Lay a value over the recipe: `--set train.learning_rate=1e-4`
          --output <DIR>     The folder of the new model, instead of the recipe's `output`
      -h, --help             Print help (see more with '--help')

    Global options:
          --log <FORM>    How progress is told on stderr [default: auto] [possible values: auto, lines, json, silent]
          --color <WHEN>  Whether messages are coloured [default: auto] [possible values: auto, always, never]
          --threads <N>   How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    ");
}

#[test]
fn help_of_generate() {
    insta::assert_snapshot!(told(&["generate", "-h"]), @r#"
    exit 0
    ----- stdout
    Continue a prompt

    Usage: peft generate [OPTIONS] --model <MODEL> <--prompt <TEXT>|--prompts <FILE>>

    Options:
          --model <MODEL>           A folder, a `.gguf` file or a Hub id (`org/name[@revision]`)
          --adapter <DIR>           The folder of an adapter
          --dtype <DTYPE>           The number format of the weights [default: auto] [possible values: auto, f32, bf16]
          --prompt <TEXT>           Continue this text; `-` reads it from stdin, without the line break at its end
          --prompts <FILE>          Answer each record of this file, `{"prompt": ".."}` or `{"messages": [..]}`, with a line of JSON
          --system <TEXT>           Put this system message before each prompt
          --max-new-tokens <N>      The most tokens to generate [default: 256]
          --temperature <T>         Divides the logits before sampling; 0 takes the most likely token [default: 0]
          --top-k <K>               Sample among the K most likely tokens
          --top-p <P>               Sample among the fewest tokens that have this probability together
          --repetition-penalty <R>  Divides the logits of tokens that occurred; 1 changes nothing [default: 1]
          --seed <SEED>             The seed of sampling [default: 42]
          --raw                     Give the prompt to the model as it is, without the chat template
      -h, --help                    Print help (see more with '--help')

    Global options:
          --log <FORM>    How progress is told on stderr [default: auto] [possible values: auto, lines, json, silent]
          --color <WHEN>  Whether messages are coloured [default: auto] [possible values: auto, always, never]
          --threads <N>   How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    "#);
}

#[test]
fn help_of_chat() {
    insta::assert_snapshot!(told(&["chat", "-h"]), @"
    exit 0
    ----- stdout
    Talk to a model

    Usage: peft chat [OPTIONS] --model <MODEL>

    Options:
          --model <MODEL>           A folder, a `.gguf` file or a Hub id (`org/name[@revision]`)
          --adapter <DIR>           The folder of an adapter
          --dtype <DTYPE>           The number format of the weights [default: auto] [possible values: auto, f32, bf16]
          --system <TEXT>           Set the system message, which the model keeps to
          --max-new-tokens <N>      The most tokens of an answer [default: 1024]
          --temperature <T>         Divides the logits before sampling; 0 takes the most likely token [default: 0]
          --top-k <K>               Sample among the K most likely tokens
          --top-p <P>               Sample among the fewest tokens that have this probability together
          --repetition-penalty <R>  Divides the logits of tokens that occurred; 1 changes nothing [default: 1]
          --seed <SEED>             The seed of sampling [default: 42]
      -h, --help                    Print help (see more with '--help')

    Global options:
          --log <FORM>    How progress is told on stderr [default: auto] [possible values: auto, lines, json, silent]
          --color <WHEN>  Whether messages are coloured [default: auto] [possible values: auto, always, never]
          --threads <N>   How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    ");
}

#[test]
fn help_of_eval() {
    insta::assert_snapshot!(told(&["eval", "--help"]), @"
    exit 0
    ----- stdout
    Measure a model on a data file

    Usage: peft eval [OPTIONS] --model <MODEL> --data <FILE> <MEASURE>

    Arguments:
      <MEASURE>
              What to measure

              Possible values:
              - perplexity: Mean loss per predicted token, and its exponential
              - routing:    How a mixture of experts spreads its tokens

    Options:
          --model <MODEL>
              A folder, a `.gguf` file or a Hub id (`org/name[@revision]`)

          --adapter <DIR>
              The folder of an adapter

          --dtype <DTYPE>
              The number format of the weights

              Possible values:
              - auto: bf16 where the files have that or quantized values, else f32
              - f32:  32-bit floats
              - bf16: bfloat16

              [default: auto]

          --data <FILE>
              A `.jsonl` or `.json` file

          --max-length <N>
              Cut each record to this many tokens

          --svg <FILE>
              Draw the load of every expert into this file (routing only)

          --json
              Print one JSON document

      -h, --help
              Print help (see a summary with '-h')

    Global options:
          --log <FORM>
              How progress is told on stderr

              Possible values:
              - auto:   A live bar on a terminal, lines elsewhere
              - lines:  Plain lines; for the steps about a hundred, and one a minute at least
              - json:   Every event as a line of JSON
              - silent: Warnings and errors only

              [default: auto]

          --color <WHEN>
              Whether messages are coloured

              Possible values:
              - auto:   On a terminal, unless `NO_COLOR` is set
              - always: Always
              - never:  Never

              [default: auto]

          --threads <N>
              How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    ");
}

#[test]
fn help_of_inspect() {
    insta::assert_snapshot!(told(&["inspect", "-h"]), @"
    exit 0
    ----- stdout
    Describe a model, an adapter, a data file or a run

    Usage: peft inspect [OPTIONS] <PATH>

    Arguments:
      <PATH>  A model, an adapter, a data file or a run

    Options:
          --csv   Print the metrics of a run as CSV
          --json  Print one JSON document
      -h, --help  Print help (see more with '--help')

    Global options:
          --log <FORM>    How progress is told on stderr [default: auto] [possible values: auto, lines, json, silent]
          --color <WHEN>  Whether messages are coloured [default: auto] [possible values: auto, always, never]
          --threads <N>   How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    ");
}

#[test]
fn help_of_recipes() {
    insta::assert_snapshot!(told(&["recipes", "-h"]), @"
    exit 0
    ----- stdout
    Show recipes and what they can say, or convert the configuration of another tool

    Usage: peft recipes [OPTIONS] [COMMAND]

    Commands:
      list     List the recipes built into this program
      show     Print a recipe
      keys     List the keys of recipes, or describe one
      schema   Print a JSON Schema of recipes, which editors check and complete keys with
      convert  Turn a configuration of axolotl, LLaMA-Factory or mlx-lm into a recipe
      help     Print this message or the help of the given subcommand(s)

    Options:
      -h, --help  Print help (see more with '--help')

    Global options:
          --log <FORM>    How progress is told on stderr [default: auto] [possible values: auto, lines, json, silent]
          --color <WHEN>  Whether messages are coloured [default: auto] [possible values: auto, always, never]
          --threads <N>   How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    ");
}

#[test]
fn version() {
    assert_eq!(told(&["--version"]), format!("exit 0\n----- stdout\npeft {}\n", env!("CARGO_PKG_VERSION")));
}

/// Help is a single sentence per line without its full stop, and belittles nothing.
#[test]
fn help_reads_well() {
    for command in [
        "finetune",
        "check",
        "merge",
        "upcycle",
        "generate",
        "chat",
        "eval",
        "inspect",
        "recipes",
        "completions",
        "man",
    ] {
        let text = told(&[command, "-h"]);
        assert!(!text.contains("simply"), "{text}");
        let full_stop = text.lines().find(|line| line.ends_with('.'));
        assert_eq!(full_stop, None, "a full stop in the help of {command}");
    }
}

#[test]
fn recipes_are_listed_and_shown() {
    let list = told(&["recipes"]);
    let quickstart = include_str!("../recipes/quickstart.toml");
    let about = quickstart.lines().next().unwrap().trim_start_matches("# ");
    let line = list.lines().find(|line| line.starts_with("quickstart ")).unwrap();
    assert!(line.ends_with(about), "{list}");
    assert_eq!(list, told(&["recipes", "list"]));
    let shown = peft(&["recipes", "show", "quickstart"]).output().unwrap();
    assert_eq!(String::from_utf8(shown.stdout).unwrap(), quickstart);
    insta::assert_snapshot!(told(&["recipes", "show", "quikstart"]), @"
    exit 2
    ----- stderr
    error: there is no built-in recipe `quikstart`
    hint: did you mean `quickstart`?
    ");
}

#[test]
fn wrong_requests_exit_with_2_and_say_what_to_do() {
    insta::assert_snapshot!(told(&["finetune"]), @"
    exit 2
    ----- stderr
    error: the following required arguments were not provided:
      <RECIPE>

    Usage: peft finetune <RECIPE>

    For more information, try '--help'.
    ");
    insta::assert_snapshot!(told(&["fintune", "quickstart"]), @"
    exit 2
    ----- stderr
    error: unrecognized subcommand 'fintune'

      tip: a similar subcommand exists: 'finetune'

    Usage: peft [OPTIONS] <COMMAND>

    For more information, try '--help'.
    ");
    for (wrong, tip) in [
        ("train", "'peft finetune' trains what a recipe says"),
        ("run", "'peft finetune' trains what a recipe says"),
        ("export", "'peft merge' folds an adapter into a model's weights; nothing else is exported yet"),
    ] {
        let refused = told(&[wrong, "quickstart"]);
        let error = format!("error: unrecognized subcommand '{wrong}'\n\n  tip: {tip}\n\nUsage: peft");
        assert!(refused.starts_with("exit 2\n") && refused.contains(&error), "{refused}");
    }
    let choices = ["eval", "choices", "--model", "m", "--data", "d"];
    insta::assert_snapshot!(told(&choices), @"
    exit 2
    ----- stderr
    error: `peft eval choices` is not built in this version
    ");
    insta::assert_snapshot!(told(&["finetune", "recipes/quikstart.toml"]), @"
    exit 2
    ----- stderr
    error: there is no file and no built-in recipe `recipes/quikstart.toml`
    hint: did you mean the built-in recipe `quickstart`?
    ");
    insta::assert_snapshot!(told(&["finetune", "nothing/like/it.toml"]), @"
    exit 2
    ----- stderr
    error: there is no file and no built-in recipe `nothing/like/it.toml`
    hint: `peft recipes` lists the built-in recipes
    ");
    insta::assert_snapshot!(told(&["finetune", "recipes"]), @"
    exit 2
    ----- stderr
    error: recipes: a folder, where a recipe file was expected
    ");
    insta::assert_snapshot!(told(&["finetune", "quickstart", "--set", "train.learnign_rate=1"]), @"
    exit 2
    ----- stderr
    error: `--set train.learnign_rate=1`: unknown key `train.learnign_rate`
    hint: did you mean `learning_rate`?
    ");
    insta::assert_snapshot!(told(&["finetune", "quickstart", "--set", "train.full=true"]), @"
    exit 2
    ----- stderr
    error: `--set train.full=true`: `train.full = true` trains all weights, so there can be no `[adapter]`
    hint: leave one of them out
    ");
    insta::assert_snapshot!(told(&["upcycle", "quickstart"]), @r#"
    exit 2
    ----- stderr
    error: `quickstart` has `task = "finetune"`
    hint: `peft finetune quickstart` runs it
    "#);
    let top_p = ["generate", "--model", "m", "--prompt", "p", "--top-p", "1.5"];
    insta::assert_snapshot!(told(&top_p), @"
    exit 2
    ----- stderr
    error: invalid value '1.5' for '--top-p <P>': expected a number above 0 and at most 1

    For more information, try '--help'.
    ");
}

#[test]
fn a_wrong_line_of_a_recipe_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.toml");
    let text = include_str!("../recipes/quickstart.toml").replace("learning_rate", "learnign_rate");
    let line = text.lines().position(|line| line.contains("learnign_rate")).unwrap() + 1;
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    assert_eq!(
        told(&["finetune", path]),
        format!(
            "exit 2\n----- stderr\nerror: {path}:{line}: unknown key `train.learnign_rate`\n\
             hint: did you mean `learning_rate`?\n"
        )
    );
}

#[test]
fn errors_are_json_when_progress_is() {
    let output = peft(&["finetune", "quickstart", "--set", "seed=x", "--log", "json"]).output().unwrap();
    let event: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(event["event"], "error");
    assert_eq!(event["exit_code"], 2);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn colour_is_only_there_when_wanted() {
    let arguments = ["recipes", "show", "nothing"];
    let plain = peft(&arguments).output().unwrap();
    assert!(!plain.stderr.contains(&0x1b));
    let coloured = peft(&arguments).args(["--color", "always"]).output().unwrap();
    assert!(coloured.stderr.starts_with(b"\x1b["));
    let without = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        ["\x1b[0m", "\x1b[1m", "\x1b[31m", "\x1b[36m"].iter().fold(text, |text, code| text.replace(code, ""))
    };
    assert_eq!(without(&coloured.stderr), without(&plain.stderr));
}

/// `peft … | head -0` ends quietly.
#[test]
fn a_closed_pipe_is_no_error() {
    let mut child = peft(&["recipes", "show", "quickstart"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    let status = child.wait().unwrap();
    assert_eq!((status.code(), stderr.as_str()), (Some(0), ""));
}
