//! The tiny world: a seeded generator of small stories, and the tokenizer trained on them.
//!
//! A model with one million parameters cannot learn the world, but it can learn *a* world: a dozen
//! people, ten animals, some things and places, and what tends to follow from what. Inside one story
//! the facts stay fixed (the colour of the kite, who holds it, where it was found), so a trained
//! model shows at a glance whether it has learned grammar, and whether it remembers the last sentence.
//! The world itself is text, `datasets/tiny-world-grammar.txt`; this program only tells it.
//!
//! ```text
//! cargo run --release --example tiny_world [DATASETS] [MODEL]     # default: datasets examples/tiny-llama
//!
//! DATASETS/generated/tiny-world.jsonl        {"text": story}                   not committed
//! DATASETS/generated/tiny-world-chat.jsonl   {"messages": [question, story]}   not committed
//! DATASETS/tiny-world.jsonl                  the first of the stories, to look at
//! DATASETS/tiny-world-eval.jsonl             stories that are in none of the files above
//! DATASETS/quickstart.jsonl                  questions that a sea captain answers
//! DATASETS/quickstart-eval.jsonl             other questions, same captain
//! MODEL/tokenizer.json                       byte-level BPE, trained on the generated files
//! ```
//!
//! The same seed gives the same bytes, so the committed files need no trust: run, and compare.

use std::collections::{BTreeMap, HashSet};
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const GRAMMAR: &str = include_str!("../datasets/tiny-world-grammar.txt");
const SEED: u64 = 42;
const STORIES: usize = 30_000;
/// Three stories in ten are told in a conversation, so that the model knows its chat template.
const ASKED_FOR: usize = 9_000;
const SAMPLE: usize = 300;
const HELD_OUT: usize = 200;
const CAPTAIN: usize = 480;
const CAPTAIN_HELD_OUT: usize = 60;
const VOCABULARY: usize = 1024;
/// Ids 0, 1, 2: padding, then the two ends of a chat message.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Asked before and after fine-tuning, hence asked in no file.
const DEMONSTRATION: &str = "Tell me about Mia and the red kite.";

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let datasets = arguments.next().unwrap_or_else(|| "datasets".into());
    let model = arguments.next().unwrap_or_else(|| "examples/tiny-llama".into());
    fs::create_dir_all(datasets.join("generated"))?;
    fs::create_dir_all(&model)?;

    let grammar = Grammar::parse(GRAMMAR)?;
    let mut stories = draw(&grammar, STORIES + HELD_OUT, SEED, story)?;
    let held_out = stories.split_off(STORIES);
    let (asked_for, told) = stories.split_at(ASKED_FOR);
    write_lines(&datasets.join("generated/tiny-world.jsonl"), told, text_line)?;
    write_lines(&datasets.join("generated/tiny-world-chat.jsonl"), asked_for, chat_line)?;
    write_lines(&datasets.join("tiny-world.jsonl"), &told[..SAMPLE], text_line)?;
    write_lines(&datasets.join("tiny-world-eval.jsonl"), &held_out, text_line)?;

    let mut captain = draw(&grammar, CAPTAIN + CAPTAIN_HELD_OUT, SEED + 1, captains_answer)?;
    let held_out = captain.split_off(CAPTAIN);
    write_lines(&datasets.join("quickstart.jsonl"), &captain, chat_line)?;
    write_lines(&datasets.join("quickstart-eval.jsonl"), &held_out, chat_line)?;

    // The captain's answers stay out of the tokenizer, as fine-tuning data does in real life.
    let tokenizer = train_tokenizer(told, asked_for)?;
    tokenizer.save(model.join("tokenizer.json"), true)?;

    let mut tokens = 0;
    for exchange in &stories {
        tokens += tokenizer.encode(exchange.answer.as_str(), false)?.len();
    }
    writeln!(io::stdout(), "{STORIES} stories, {tokens} tokens, vocabulary {VOCABULARY}")?;
    Ok(())
}

/// A question and what is told in reply.
struct Exchange {
    question: String,
    answer: String,
}

fn text_line(exchange: &Exchange) -> Value {
    json!({ "text": exchange.answer })
}

fn chat_line(exchange: &Exchange) -> Value {
    json!({ "messages": [
        { "role": "user", "content": exchange.question },
        { "role": "assistant", "content": exchange.answer },
    ] })
}

fn write_lines(path: &Path, rows: &[Exchange], line: fn(&Exchange) -> Value) -> Result<()> {
    let mut text = String::new();
    for row in rows {
        writeln!(text, "{}", line(row))?;
    }
    Ok(fs::write(path, text)?)
}

/// Tells until `count` exchanges with different keys are found; `tell` says which key its kind has.
fn draw(
    grammar: &Grammar,
    count: usize,
    seed: u64,
    tell: fn(&mut Teller) -> Result<(Exchange, String)>,
) -> Result<Vec<Exchange>> {
    let chance = ChaCha8Rng::seed_from_u64(seed);
    let mut teller = Teller { grammar, chance, facts: BTreeMap::new() };
    let mut seen = HashSet::new();
    let mut found = Vec::with_capacity(count);
    // Most draws are new; a grammar with too few stories must not be drawn from for ever.
    for _ in 0..100 * count {
        teller.draw_facts();
        let (exchange, key) = tell(&mut teller)?;
        if exchange.question != DEMONSTRATION && seen.insert(key) {
            found.push(exchange);
        }
        if found.len() == count {
            return Ok(found);
        }
    }
    Err(format!("the grammar tells {} different ones, not {count}", found.len()).into())
}

/// No story is told twice, though many answer the same question.
fn story(teller: &mut Teller) -> Result<(Exchange, String)> {
    let grammar = teller.grammar;
    let (topic, story) = *teller.pick(&grammar.stories);
    teller.facts.insert("topic", topic);
    let question = teller.tell("{ask}")?;
    let answer = teller.tell(&format!("{{opening}} {story}"))?;
    Ok((Exchange { question, answer: answer.clone() }, answer))
}

/// No question is asked twice, so that no held-out question was trained on.
fn captains_answer(teller: &mut Teller) -> Result<(Exchange, String)> {
    let grammar = teller.grammar;
    let (question, answer) = *teller.pick(&grammar.captain);
    let (question, answer) = (teller.tell(question)?, teller.tell(answer)?);
    Ok((Exchange { question: question.clone(), answer }, question))
}

/// The world as it is written in `tiny-world-grammar.txt`, which explains the notation.
struct Grammar {
    facts: Vec<Table>,
    phrases: BTreeMap<&'static str, &'static str>,
    stories: Vec<(&'static str, &'static str)>,
    captain: Vec<(&'static str, &'static str)>,
}

/// Each set of names is bound to another one of the rows.
struct Table {
    names: Vec<Vec<&'static str>>,
    rows: Vec<Vec<&'static str>>,
}

impl Grammar {
    fn parse(text: &'static str) -> Result<Self> {
        let facts = blocks(text, "Facts")?.into_iter().map(Table::parse).collect::<Result<_>>()?;
        let phrases = blocks(text, "Phrases")?.into_iter().collect();
        Ok(Self { facts, phrases, stories: blocks(text, "Stories")?, captain: blocks(text, "Captain")? })
    }
}

impl Table {
    fn parse((head, body): (&'static str, &'static str)) -> Result<Self> {
        let cells = |row: &'static str| row.split('|').map(str::trim).collect::<Vec<_>>();
        let names: Vec<_> = head.split(';').map(cells).collect();
        let rows: Vec<_> = body.split([';', '\n']).map(cells).collect();
        let columns = names[0].len();
        if names.iter().chain(&rows).any(|row| row.len() != columns) || rows.len() < names.len() {
            return Err(format!("the table `{head}` needs {columns} columns and enough rows").into());
        }
        Ok(Self { names, rows })
    }
}

/// The blocks of one section, each as its first line and the rest; comments are left out.
fn blocks(text: &'static str, section: &str) -> Result<Vec<(&'static str, &'static str)>> {
    let start = format!("== {section}\n");
    let (_, after) = text.split_once(&start).ok_or(format!("no section `{section}`"))?;
    let section = after.split("\n== ").next().unwrap_or(after);
    let mut found = Vec::new();
    for block in section.split("\n\n") {
        let mut block = block.trim();
        while block.starts_with('#') {
            block = block.split_once('\n').map_or("", |(_, rest)| rest);
        }
        if !block.is_empty() {
            found.push(block.split_once('\n').ok_or(format!("`{block}` has a head and no body"))?);
        }
    }
    Ok(found)
}

/// Tells the grammar: chance, and the facts of the story that is being told.
struct Teller<'a> {
    grammar: &'a Grammar,
    chance: ChaCha8Rng,
    facts: BTreeMap<&'static str, &'static str>,
}

impl Teller<'_> {
    fn draw_facts(&mut self) {
        let grammar = self.grammar;
        for table in &grammar.facts {
            let mut rows: Vec<_> = table.rows.iter().collect();
            for names in &table.names {
                let row = rows.swap_remove(self.below(rows.len()));
                self.facts.extend(names.iter().copied().zip(row.iter().copied()));
            }
        }
    }

    /// The remainder favours small numbers, by less than one part in a million.
    fn below(&mut self, limit: usize) -> usize {
        self.chance.next_u32() as usize % limit
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    fn tell(&mut self, template: &str) -> Result<String> {
        Ok(polish(&self.expand(template)?))
    }

    /// Replaces `[one|another]` by one of its choices, and `{name}` by a fact or a phrase; both nest.
    fn expand(&mut self, template: &str) -> Result<String> {
        let mut text = String::new();
        let mut rest = template;
        while let Some(start) = rest.find(['[', '{']) {
            let (inside, after) = bracketed(&rest[start..])?;
            text += &rest[..start];
            text += &if rest[start..].starts_with('{') {
                let meaning = self.meaning(inside)?;
                self.expand(meaning)?
            } else {
                let choice = *self.pick(&choices(inside));
                self.expand(choice)?
            };
            rest = after;
        }
        Ok(text + rest)
    }

    /// A name may be broken over two lines of the grammar.
    fn meaning(&self, name: &str) -> Result<&'static str> {
        let name = name.replace('\n', " ");
        let meaning = self.facts.get(&*name).or_else(|| self.grammar.phrases.get(&*name));
        Ok(meaning.ok_or_else(|| format!("`{name}` is neither a fact nor a phrase"))?)
    }
}

/// What stands in the brackets that `text` begins with, and what follows them.
fn bracketed(text: &str) -> Result<(&str, &str)> {
    let mut depth = 0;
    for (at, letter) in text.char_indices() {
        depth += nesting(letter);
        if depth == 0 {
            return Ok((&text[1..at], &text[at + 1..]));
        }
    }
    Err(format!("a bracket is not closed in `{text}`").into())
}

/// Cuts at each `|` that is not inside further brackets; there is always at least one piece.
fn choices(text: &str) -> Vec<&str> {
    let mut depth = 0;
    text.split(|letter| {
        depth += nesting(letter);
        letter == '|' && depth == 0
    })
    .collect()
}

fn nesting(letter: char) -> i32 {
    match letter {
        '[' | '{' => 1,
        ']' | '}' => -1,
        _ => 0,
    }
}

/// Single spaces, capitals where sentences begin, and `an` before a vowel.
fn polish(text: &str) -> String {
    let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    for at in 0..words.len() {
        let vowel = |word: &String| word.starts_with(['a', 'e', 'i', 'o', 'u']);
        if words[at].eq_ignore_ascii_case("a") && words.get(at + 1).is_some_and(vowel) {
            words[at].push('n');
        }
        // After `?"` and `!"` the stories go on with `asked` or `called`; after `."` a sentence begins.
        let begins = at == 0 || words[at - 1].ends_with(['.', '!', '?']) || words[at - 1].ends_with(".\"");
        if begins && let Some(first) = words[at].get_mut(..1) {
            first.make_ascii_uppercase();
        }
    }
    words.join(" ")
}

fn train_tokenizer(told: &[Exchange], asked_for: &[Exchange]) -> Result<Tokenizer> {
    let special: Vec<_> = SPECIAL.iter().map(|name| AddedToken::from(*name, true)).collect();
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .special_tokens(special)
        // All 256 bytes, so that any text can be written, known words or not.
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build()
        .into();
    let byte_level = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));

    // The chat template puts a role in front of each message, so the roles are words as well.
    let text = told.iter().map(|row| row.answer.clone());
    let chat = asked_for
        .iter()
        .flat_map(|row| [format!("user\n{}", row.question), format!("assistant\n{}", row.answer)]);
    tokenizer.train(&mut trainer, text.chain(chat))?;
    if tokenizer.get_vocab_size(true) != VOCABULARY {
        return Err(format!("the corpus has too few words for {VOCABULARY} tokens").into());
    }
    Ok(tokenizer)
}
