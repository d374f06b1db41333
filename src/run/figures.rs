//! Numbers as people read them.

/// With thousands separators: `1,234,567`.
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// An amount of memory, rounded: `1.8 GiB`.
#[must_use]
pub fn bytes(number: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut amount = number as f64;
    let mut unit = 0;
    // 1023.95 would be rounded to 1024.0 of the smaller unit.
    while amount >= 1023.95 && unit + 1 < UNITS.len() {
        amount /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{number} B") } else { format!("{amount:.1} {}", UNITS[unit]) }
}

/// A duration, rounded to seconds: `12s`, `3m05s`, `2h07m`.
#[must_use]
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
    }
}

/// The sentence in which Hugging Face PEFT says how much is trained; `all` counts the trainable parameters in.
#[must_use]
pub fn trainable(trainable: u64, all: u64) -> String {
    let percent = 100.0 * trainable as f64 / all as f64;
    format!(
        "trainable params: {} || all params: {} || trainable%: {percent:.4}",
        count(trainable),
        count(all)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_separators_between_thousands() {
        let numbers = [0, 12, 123, 1234, 123_456, 1_234_567].map(count);
        assert_eq!(numbers, ["0", "12", "123", "1,234", "123,456", "1,234,567"]);
    }

    #[test]
    fn bytes_take_the_unit_that_keeps_them_short() {
        let amounts = [0, 1023, 1024, 1 << 20, (1 << 20) - 1, 1_932_735_283, 3 << 40].map(bytes);
        assert_eq!(amounts, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 MiB", "1.8 GiB", "3.0 TiB"]);
    }

    #[test]
    fn durations_drop_what_does_not_matter() {
        let durations = [0.2, 59.4, 59.6, 185.0, 3600.0, 7634.0].map(duration);
        assert_eq!(durations, ["0s", "59s", "1m00s", "3m05s", "1h00m", "2h07m"]);
    }

    /// As `PeftModel.print_trainable_parameters` of PEFT 0.21 prints them.
    #[test]
    fn trainable_parameters_are_said_as_peft_says_them() {
        assert_eq!(
            trainable(1234, 5678),
            "trainable params: 1,234 || all params: 5,678 || trainable%: 21.7330"
        );
    }
}
