//! The source of a template before minijinja reads it: its dialect is translated, and what would overflow minijinja's
//! stack or memory is refused.

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;

use crate::error::{Error, Result};

/// Bytes of a template. The longest of published models have 20 KB.
const LONGEST: usize = 256 << 10;

/// Operators inside each other in one tag, and `elif` in one template: minijinja recurses over them.
const DEEPEST: usize = 400;

/// Whole numbers of a tag that multiplies texts or lists, all multiplied: minijinja computes constants while it compiles.
const MOST_COPIES: u128 = 1_000_000;

/// The source in minijinja's dialect, and whether it marks generations: `{% generation %} … {% endgeneration %}` as
/// `{% filter generation %} … {% endfilter %}`, and strings that a backslash carries on to the next line on one line.
pub(super) fn translate(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut marks) = (String::with_capacity(source.len()), source, false);
    let next = |rest: &str| {
        let found = ["{%", "{{", "{#"].iter().zip(["%}", "}}", "#}"]);
        found.filter_map(|(open, close)| rest.find(open).map(|at| (at, close))).min()
    };
    while let Some((at, close)) = next(rest) {
        let (text, tag) = rest.split_at(at);
        let (tag, after) = tag.split_at(tag.find(close).map_or(tag.len(), |end| end + 2));
        out.push_str(text);
        match tag.trim_matches(['{', '%', '-', '+', '}']).trim() {
            "generation" if close == "%}" => {
                marks = true;
                out.push_str(&tag.replacen("generation", "filter generation", 1));
            }
            "endgeneration" if close == "%}" => out.push_str(&tag.replacen("endgeneration", "endfilter", 1)),
            _ => out.push_str(&tag.replace("\\\n", "")),
        }
        rest = after;
    }
    out.push_str(rest);
    (out, marks)
}

/// Refuses a source that is too long, too deep or too large for minijinja's parser.
pub(super) fn refuse_unbounded(source: &str, syntax: &SyntaxConfig) -> Result<()> {
    if source.len() > LONGEST {
        let found = source.len() >> 10;
        return Err(Error::invalid(format!(
            "the chat template has {found} KiB, and at most {} are read",
            LONGEST >> 10
        ))
        .with_hint("the templates of published models have up to 20: look whether the right file is there"));
    }
    let mut tag = Tag::default();
    let mut branches = 0;
    for token in tokenize(source, false, syntax.clone()) {
        // What is no token is said by the parser, with its line.
        let Ok((token, span)) = token else { return Ok(()) };
        branches += usize::from(matches!(token, Token::Ident("elif")));
        tag.take(&token);
        let what = if tag.depth() > DEEPEST {
            format!("nests more than {DEEPEST} operators")
        } else if branches > DEEPEST {
            format!("has more than {DEEPEST} `elif`")
        } else if tag.copies() > MOST_COPIES {
            format!("repeats a constant more than {MOST_COPIES} times")
        } else {
            continue;
        };
        return Err(Error::invalid(format!("the chat template {what} in line {}", span.start_line))
            .with_hint("no template of a published model does: look whether the right file is there"));
    }
    Ok(())
}

/// Tracks what has been read of a template tag so far.
#[derive(Default)]
struct Tag {
    /// Operators since the last comma, for each bracket that is open.
    operators: Vec<usize>,
    multiplies: bool,
    has_texts: bool,
    product: u128,
}

impl Tag {
    fn take(&mut self, token: &Token<'_>) {
        match token {
            Token::TemplateData(_) | Token::VariableStart | Token::BlockStart => {
                *self = Self { operators: vec![0], product: 1, ..Self::default() };
                return;
            }
            Token::Comma => {
                self.has_texts = true;
                if let Some(count) = self.operators.last_mut() {
                    *count = 0;
                }
                return;
            }
            Token::BracketClose | Token::ParenClose | Token::BraceClose => {
                self.operators.pop();
                return;
            }
            Token::Str(_) | Token::String(_) => {
                self.has_texts = true;
                return;
            }
            Token::Int(number) => self.multiply(u128::from(*number)),
            Token::Int128(number) => self.multiply(**number),
            Token::Mul | Token::Pow => self.multiplies = true,
            _ => {}
        }
        let operates = match token {
            Token::Ident(name) => matches!(*name, "not" | "is" | "in" | "and" | "or" | "if" | "else"),
            Token::Int(_) | Token::Int128(_) | Token::Float(_) => false,
            _ => true,
        };
        if let Some(count) = self.operators.last_mut() {
            *count += usize::from(operates);
        }
        if matches!(token, Token::BracketOpen | Token::ParenOpen | Token::BraceOpen) {
            self.has_texts |= !matches!(token, Token::ParenOpen);
            self.operators.push(0);
        }
    }

    fn multiply(&mut self, number: u128) {
        self.product = self.product.saturating_mul(number.max(1));
    }

    fn depth(&self) -> usize {
        self.operators.iter().sum()
    }

    fn copies(&self) -> u128 {
        if self.multiplies && self.has_texts { self.product } else { 0 }
    }
}
