//! A template compiled so that each operation which can make much of little, or look at much, is paid for.
//!
//! minijinja counts steps, and a step of `a + a` doubles a text. So checks are put between its instructions: filters
//! and tests of ours that see what an instruction is given or what it has made.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use minijinja::machinery::{CodeGenerator, Instruction, Instructions, eval, make_string_output, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};

use super::budget;
use super::builtins::{CONCATENATE, ITEM, LOOKED_AT, LOOPED_OVER, MADE, MULTIPLY, NOT_A_NAMESPACE};

const NAME: &str = "chat_template";

/// A text that is written as it stands costs no more than a step up to this length.
const FREE_TEXT: usize = 64;

/// A constant that is looked at for nothing.
const SMALL: u64 = 512;

/// Holds the instructions of a compiled template, which minijinja runs.
#[derive(Debug)]
pub(super) struct Compiled {
    main: Instructions<'static>,
    blocks: BTreeMap<&'static str, Instructions<'static>>,
}

impl Compiled {
    /// Parses and compiles a source in minijinja's dialect.
    pub(super) fn new(source: &str, syntax: SyntaxConfig) -> Result<Self, Error> {
        let source = kept(source);
        let tree = parse(source, NAME, syntax)?;
        let mut generator = CodeGenerator::new(NAME, source);
        generator.compile_stmt(&tree);
        let (main, blocks) = generator.finish();
        let bounded_block = |(name, code)| Ok((name, bounded(&code)?));
        let blocks = blocks.into_iter().map(bounded_block).collect::<Result<_, Error>>()?;
        Ok(Self { main: bounded(&main)?, blocks })
    }

    /// Whether it looks up a variable, or calls a function, of this name.
    pub(super) fn asks_for(&self, name: &str) -> bool {
        let asks = |instruction: &Instruction<'_>| match instruction {
            Instruction::Lookup(asked) | Instruction::CallFunction(asked, _) => *asked == name,
            _ => false,
        };
        std::iter::once(&self.main).chain(self.blocks.values()).any(|code| instructions(code).any(asks))
    }

    /// Runs it.
    pub(super) fn render(&self, environment: &Environment<'_>, variables: Value) -> Result<String, Error> {
        let mut rendered = String::new();
        let mut output = make_string_output(&mut rendered);
        eval(environment, &self.main, variables, &self.blocks, &mut output, AutoEscape::None)?;
        drop(output);
        Ok(rendered)
    }
}

/// Keeps a text until the program ends, because minijinja's instructions point into it. Programs open few templates,
/// and each is kept once.
fn kept(source: &str) -> &'static str {
    static SOURCES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

    let mut sources = SOURCES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = sources.get(source) {
        return found;
    }
    let kept: &'static str = Box::leak(source.into());
    sources.insert(kept);
    kept
}

/// The instructions with checks between them.
fn bounded(code: &Instructions<'static>) -> Result<Instructions<'static>, Error> {
    let targets: BTreeSet<u32> =
        instructions(code).filter_map(|instruction| target(&mut instruction.clone()).copied()).collect();
    let mut out = Instructions::new(NAME, code.source());
    // Where each instruction begins now.
    let mut moved = Vec::new();
    let mut count = 0;
    for (index, instruction) in (0..).zip(instructions(code)) {
        moved.push(count);
        // Nothing is known of what comes from elsewhere.
        let came_straight = !targets.contains(&index);
        let before = index.checked_sub(1).filter(|_| came_straight).and_then(|index| code.get(index));
        for part in checked(instruction, before, code.get(index + 1))? {
            let line = code.get_line(index).and_then(|line| u16::try_from(line).ok()).unwrap_or(u16::MAX);
            count = out.add_with_line(part, line) + 1;
        }
    }
    for index in 0..count {
        if let Some(target) = out.get_mut(index).and_then(target) {
            *target = moved.get(*target as usize).copied().unwrap_or(count);
        }
    }
    Ok(out)
}

fn instructions<'a>(code: &'a Instructions<'static>) -> impl Iterator<Item = &'a Instruction<'static>> {
    (0..).map_while(|index| code.get(index))
}

/// Where an instruction jumps to.
fn target<'a>(instruction: &'a mut Instruction<'static>) -> Option<&'a mut u32> {
    match instruction {
        Instruction::Iterate(target)
        | Instruction::Jump(target)
        | Instruction::JumpIfFalse(target)
        | Instruction::JumpIfFalseOrPop(target)
        | Instruction::JumpIfTrueOrPop(target)
        | Instruction::BuildMacro(_, target, _) => Some(target),
        _ => None,
    }
}

/// An instruction with its checks, or the filter or test that does its work in bounds.
fn checked(
    instruction: &Instruction<'static>,
    before: Option<&Instruction<'static>>,
    after: Option<&Instruction<'static>>,
) -> Result<Vec<Instruction<'static>>, Error> {
    let same = instruction.clone();
    let apply = |name, count| Instruction::ApplyFilter(name, Some(count), !0);
    let test = |name| vec![Instruction::PerformTest(name, Some(2), !0)];
    // What an operator has on its right; looking at it costs no more than a step.
    let constant = match before {
        Some(Instruction::LoadConst(value)) if budget::size(value) <= SMALL => Some(value),
        _ => None,
    };
    Ok(match instruction {
        Instruction::EmitRaw(text) if text.len() > FREE_TEXT => {
            vec![Instruction::LoadConst(Value::from(*text)), Instruction::Emit]
        }
        Instruction::StringConcat => vec![apply(CONCATENATE, 2)],
        Instruction::Mul => vec![apply(MULTIPLY, 2)],
        Instruction::Eq if constant.is_none() => test("eq"),
        Instruction::Ne if constant.is_none() => test("ne"),
        Instruction::Lt if constant.is_none() => test("lt"),
        Instruction::Lte if constant.is_none() => test("le"),
        Instruction::Gt if constant.is_none() => test("gt"),
        Instruction::Gte if constant.is_none() => test("ge"),
        Instruction::In if constant.is_none() => test("in"),
        Instruction::CompareAndPreserve(_) if constant.is_none() => {
            vec![apply(LOOKED_AT, 2), Instruction::UnpackList(2), same]
        }
        // A place near the beginning of a text, or a key.
        Instruction::GetItem
            if constant
                .is_some_and(|key| key.as_str().is_some() || key.as_usize().is_some_and(|i| i < 64)) =>
        {
            vec![same]
        }
        Instruction::GetItem => vec![apply(ITEM, 2)],
        Instruction::Lookup(_) if matches!(after, Some(Instruction::SetAttr(_))) => {
            vec![apply(NOT_A_NAMESPACE, 1), same]
        }
        Instruction::SetAttr(name) if !matches!(before, Some(Instruction::Lookup(_))) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("`{name}` is set of what is not the name of a namespace"),
            ));
        }
        Instruction::PushLoop(_) => vec![apply(LOOPED_OVER, 1), same],
        Instruction::Add
        | Instruction::Slice
        | Instruction::BuildMap(_)
        | Instruction::BuildList(_)
        | Instruction::BuildTuple(_)
        | Instruction::CallMethod(..)
        | Instruction::CallObject(_) => vec![same, apply(MADE, 1)],
        _ => vec![same],
    })
}
