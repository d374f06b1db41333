use peft::data::{Dataset, preview};
use peft::data::{Format, Message, Order, Preparation, Role, Sampler, Source, TemplateParts, Text, TrainOn};
use serde_json::Value;
use tokenizers::Tokenizer;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn file(path: &str) -> String {
    std::fs::read_to_string(format!("{ROOT}/{path}")).unwrap()
}

fn tokenizer(special: &[&str]) -> Tokenizer {
    let mut tokenizer: Tokenizer = file("examples/tiny-llama/tokenizer.json").parse().unwrap();
    tokenizer
        .add_special_tokens(special.iter().map(|&token| tokenizers::AddedToken::from(token, true)))
        .unwrap();
    tokenizer
}

fn tiny() -> Text {
    let parts = TemplateParts {
        chat_template: Some(file("examples/tiny-llama/chat_template.jinja")),
        eos_token: Some("<|im_end|>".into()),
        ..TemplateParts::default()
    };
    Text::new(tokenizer(&[]), parts).unwrap()
}

fn messages(list: &Value) -> Vec<Message> {
    let message = |message: &Value| {
        let role = match message["role"].as_str().unwrap() {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            other => panic!("a golden with role {other}"),
        };
        let mut fields = message.as_object().unwrap().clone();
        fields.shift_remove("role");
        let content = fields.shift_remove("content");
        Message { role, content: content.map(|said| said.as_str().unwrap().to_string()), learn: None, fields }
    };
    list.as_array().unwrap().iter().map(message).collect()
}

#[test]
fn chat_templates_render_as_in_transformers() {
    let goldens: Value = serde_json::from_str(&file("tests/fixtures/chat.json")).unwrap();
    let (mut rendered, mut refused) = (0, 0);
    for golden in goldens.as_array().unwrap() {
        let token = |key: &str| golden[key].as_str().map(str::to_string);
        let (bos_token, eos_token) = (token("bos_token"), token("eos_token"));
        let special: Vec<&str> =
            [&bos_token, &eos_token].into_iter().filter_map(|token| token.as_deref()).collect();
        let tokenizer = tokenizer(&special);
        let chat_template = Some(golden["template"].as_str().unwrap().to_string());
        let parts = TemplateParts { chat_template, bos_token, eos_token, ..TemplateParts::default() };
        let text = Text::new(tokenizer, parts).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let messages = messages(&case["messages"]);
            if let Some(error) = case["error"].as_str() {
                let ours = text.render(&messages, false).unwrap_err().to_string();
                assert!(ours.contains(error), "{}: {ours}, expected {error}", golden["name"]);
                refused += 1;
                continue;
            }
            for (key, prompt) in [("rendered", false), ("rendered_with_generation_prompt", true)] {
                let ours = text.render(&messages, prompt).unwrap();
                assert_eq!(Some(ours.as_str()), case[key].as_str(), "{} {key}", golden["name"]);
            }
            rendered += 1;
        }
    }
    assert_eq!((rendered, refused), (20, 4));
}

fn quickstart() -> (Text, Dataset) {
    let text = tiny();
    let source = Source {
        path: format!("{ROOT}/datasets/quickstart.jsonl").into(),
        weight: 1.0,
        format: Format::Auto,
    };
    let preparation = Preparation {
        max_length: 512,
        train_on: TrainOn::Completion,
        eval_share: 0.1,
        eval_least: 0,
        seed: 42,
    };
    let dataset = Dataset::load(&[source], &[], &text, &preparation).unwrap();
    (text, dataset)
}

#[test]
fn what_is_learned_of_the_quickstart_is_the_answer_and_its_end() {
    let (text, dataset) = quickstart();
    assert!(dataset.warnings.is_empty());
    for row in dataset.train[0].rows.iter().chain(&dataset.eval) {
        let segments = preview(row, &text).unwrap();
        let [(question, false), (answer, true), (rest, false)] = segments.as_slice() else {
            panic!("one question and one answer, found {segments:?}")
        };
        assert!(question.ends_with("<|im_start|>assistant\n"), "{question}");
        assert!(answer.ends_with("<|im_end|>") && !answer.contains("<|im_start|>"), "{answer}");
        assert_eq!(rest, "\n");
    }
}

#[test]
fn rows_do_not_depend_on_threads() {
    let (_, here) = quickstart();
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let (_, there) = alone.install(quickstart);
    assert_eq!(here, there);
    assert_eq!(here.fingerprint(), there.fingerprint());
}

#[test]
fn an_epoch_shows_each_document_once_to_one_side_only() {
    let (_, dataset) = quickstart();
    let order = Order { seed: 42, batch_size: 4, pack: true, max_length: 512 };
    let mut sampler = Sampler::new(&dataset.train, order);
    let batches = sampler.batches_in(0);
    let mut seen: Vec<u64> = (0..batches).flat_map(|index| sampler.batch(index).documents).collect();
    let longest = (0..batches).map(|index| sampler.batch(index).tokens.len()).max().unwrap();
    assert!(longest <= 4 * 512 && longest > 4 * 480, "packed rows are nearly full, found {longest}");
    seen.extend(dataset.eval.iter().map(|row| row.document));
    seen.sort_unstable();
    assert_eq!(seen, (0..480).collect::<Vec<u64>>());
}
