//! Numbers for people.

/// Bytes in megabytes.
pub(super) fn megabytes(bytes: u64) -> String {
    format!("{} MB", short(bytes as f64 / 1e6))
}

/// A time in milliseconds.
pub(super) fn milliseconds(us: f64) -> String {
    format!("{} ms", short(us / 1e3))
}

/// A time in seconds.
pub(super) fn seconds(us: u64) -> String {
    format!("{} s", short(us as f64 / 1e6))
}

/// A time in microseconds, as the tables have it.
pub(super) fn microseconds(us: f64) -> String {
    if us < 1e9 { format!("{us:.1} us") } else { format!("{us:.3e} us") }
}

/// So many of something.
pub(super) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// How far a time is above another that is named next, as `1.50 % above `.
pub(super) fn above(us: f64, other_us: f64) -> String {
    let percent = (us / other_us - 1.0) * 100.0;
    // Nothing is any number of percent above zero.
    if percent.is_finite() { format!("{percent:.2} % above ") } else { "against ".to_owned() }
}

/// A name from a file, without characters that steer a terminal or that no XML may hold.
pub(super) fn printable(name: &str) -> String {
    name.replace(|c: char| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'), "\u{fffd}")
}

/// A name from a file that a title has room for.
pub(super) fn title(name: &str) -> String {
    let mut name = printable(name);
    if let Some((end, _)) = name.char_indices().nth(40) {
        name.replace_range(end.., "\u{2026}");
    }
    name
}

/// A number that is not negative, in few characters and to three digits or more.
fn short(number: f64) -> String {
    match number {
        1000.0..1e6 => format!("{number:.0}"),
        100.0..1000.0 => format!("{number:.1}"),
        1.0..100.0 => format!("{number:.2}"),
        1e-3..1.0 => format!("{number:.3}"),
        0.0 => "0".to_owned(),
        _ => format!("{number:.2e}"),
    }
}
