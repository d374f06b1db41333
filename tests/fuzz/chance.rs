//! Choices of chance, and mutations of plain bytes and text.

/// Numbers at the edges of types, as text; some are no JSON.
const EXTREMES: [&str; 18] = [
    "0",
    "-1",
    "1",
    "2147483648",
    "4294967296",
    "9007199254740993",
    "2305843009213693956",
    "4611686018427387904",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "1e308",
    "-1e308",
    "1e-320",
    "1e999",
    "0.5",
    "-0.0",
    "NaN",
];

/// Text that has ended programs, in strings and between them.
const PHRASES: [&str; 16] = [
    "",
    "\0",
    "\n",
    "\"",
    "\\",
    "\\ud800",
    "\u{1b}]0;title\u{7}",
    "\u{feff}",
    "\u{202e}",
    "é",
    "<|im_end|>",
    "../../../etc/passwd",
    "/dev/null",
    "{{",
    "%}",
    "[[[[[[[[",
];

/// SplitMix64, seeded by class, seed and number of the input.
pub(super) struct Chance(u64);

impl Chance {
    pub(super) fn new(class: &str, seed: u64, case: u64) -> Self {
        let name = class.bytes().fold(0u64, |sum, byte| sum.wrapping_mul(257).wrapping_add(byte.into()));
        let mut chance = Self(name ^ seed.rotate_left(32));
        chance.0 = chance.next() ^ case;
        chance
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 where that is 0.
    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % (end as u64).max(1)) as usize
    }

    pub(super) fn one_in(&mut self, many: usize) -> bool {
        self.below(many) == 0
    }

    pub(super) fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// A number at the edge of a type, as text.
    pub(super) fn extreme(&mut self) -> &'static str {
        EXTREMES[self.below(EXTREMES.len())]
    }

    pub(super) fn phrase(&mut self) -> &'static str {
        PHRASES[self.below(PHRASES.len())]
    }

    /// A part of `0..length` that is mostly short.
    fn part(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        let most = if self.one_in(4) { length - start } else { (length - start).min(16) };
        start..start + self.below(most + 1)
    }

    /// An integer at an edge or near `now`.
    pub(super) fn integer(&mut self, now: u64) -> u64 {
        match self.below(8) {
            0 => now.wrapping_add(1),
            1 => now.wrapping_sub(1),
            2 => now.wrapping_mul(2),
            3 => now / 2,
            4 => now ^ (1 << self.below(64)),
            5 => u64::MAX - self.below(32) as u64,
            6 => 1u64.wrapping_shl(self.below(64) as u32),
            _ => self.below(256) as u64,
        }
    }
}

/// Changes bytes, whatever they mean.
pub(super) fn mutate_bytes(bytes: &mut Vec<u8>, chance: &mut Chance) {
    let length = bytes.len();
    let part = chance.part(length);
    match chance.below(8) {
        0 if length > 0 => bytes[chance.below(length)] ^= 1 << chance.below(8),
        1 if length > 0 => bytes[chance.below(length)] = *chance.pick(&[0, 1, 0x7f, 0x80, 0xff]),
        2 => bytes.truncate(chance.below(length + 1)),
        3 => drop(bytes.drain(part)),
        4 => {
            let again = bytes[part.clone()].to_vec();
            bytes.splice(part.end..part.end, again);
        }
        5 => drop(bytes.splice(part, chance.phrase().bytes())),
        6 => {
            let more = vec![*chance.pick(&[0, b' ', b'[', b'a', 0xff]); 1 << chance.below(12)];
            bytes.splice(part.start..part.start, more);
        }
        _ => mutate_number(bytes, chance),
    }
}

/// Puts an extreme where a number is written in digits; somewhere, where there is none.
fn mutate_number(bytes: &mut Vec<u8>, chance: &mut Chance) {
    let from = chance.below(bytes.len());
    let is_digit = |byte: &u8| byte.is_ascii_digit();
    let start = bytes[from..].iter().position(is_digit).map_or(from, |at| from + at);
    let digits = bytes[start..].iter().take_while(|byte| is_digit(byte)).count();
    bytes.splice(start..start + digits, chance.extreme().bytes());
}

/// Changes text: also lines, and brackets and marks repeated until they are deep.
pub(super) fn mutate_text(bytes: &mut Vec<u8>, chance: &mut Chance) {
    let mut lines: Vec<Vec<u8>> = bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    if lines.is_empty() {
        return mutate_bytes(bytes, chance);
    }
    let at = chance.below(lines.len());
    match chance.below(8) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(at, lines[at].clone()),
        2 => {
            let other = chance.below(lines.len());
            lines.swap(at, other);
        }
        3 => {
            let mark = *chance.pick(&["[", "{", "(", "-", "a.", "not ", "\"", "{% if x %}"]);
            let many = mark.repeat(1 << chance.below(17));
            let place = chance.below(lines[at].len() + 1);
            lines[at].splice(place..place, many.bytes());
        }
        _ => return mutate_bytes(bytes, chance),
    }
    *bytes = lines.concat();
}
