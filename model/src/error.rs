use std::path::PathBuf;

/// Why an archive cannot be read or a program's inputs do not fit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The operating system refused.
    #[error("cannot {action} {}", file.display())]
    Io {
        /// The archive.
        file: PathBuf,
        /// `open`, `map`.
        action: &'static str,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The file is not a zip archive, or it is damaged.
    #[error("{} is not a readable zip archive: {reason}", file.display())]
    NotAZip {
        /// The archive.
        file: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The zip archive does not hold a program that `torch.export.save` wrote.
    #[error("{} is not an archive of torch.export: {reason}", file.display())]
    NotAnExport {
        /// The archive.
        file: PathBuf,
        /// What was found.
        reason: String,
    },
    /// One entry of the archive is missing, damaged or stored in a way that is not supported.
    #[error("{}: entry `{entry}` {reason}", file.display())]
    Entry {
        /// The archive.
        file: PathBuf,
        /// The entry's name.
        entry: String,
        /// What was found and what is supported.
        reason: String,
    },
    /// An entry is not the JSON that the schema asks for.
    #[error("{}: entry `{entry}` does not follow schema version {supported}", file.display(), supported = crate::SUPPORTED_SCHEMA)]
    Json {
        /// The archive.
        file: PathBuf,
        /// The entry's name.
        entry: String,
        /// What the parser says, with line and column.
        source: serde_json::Error,
    },
    /// The archive is of a version that this crate does not know.
    #[error("{}: {what} is {found}; supported is {supported}", file.display())]
    Version {
        /// The archive.
        file: PathBuf,
        /// Which of the archive's version numbers.
        what: &'static str,
        /// What was found.
        found: String,
        /// What is supported.
        supported: String,
    },
    /// The archive goes beyond one of the [`Limits`](crate::Limits).
    #[error("{}: {what} is {found}, over the limit of {limit}", file.display())]
    Limit {
        /// The archive.
        file: PathBuf,
        /// What is too large.
        what: String,
        /// What was found.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// A parameter, buffer or constant is inconsistent or stored in a way that is not supported.
    #[error("{}: weight `{weight}` {reason}", file.display())]
    Weight {
        /// The archive.
        file: PathBuf,
        /// Its fully qualified name.
        weight: String,
        /// What was found and what is supported.
        reason: String,
    },
    /// A node uses something that is not supported.
    #[error("{}: node `{node}`{} {reason}", file.display(), at(place))]
    Node {
        /// The archive.
        file: PathBuf,
        /// The node's name.
        node: String,
        /// The line of Python that it comes from, empty if unknown.
        place: String,
        /// What was found and what is supported.
        reason: String,
    },
    /// The program's inputs, outputs or values are inconsistent or of a kind that is not supported.
    #[error("{}: {what} `{name}` {reason}", file.display())]
    Signature {
        /// The archive.
        file: PathBuf,
        /// `input`, `output`, `value`.
        what: &'static str,
        /// Its name.
        name: String,
        /// What was found and what is supported.
        reason: String,
    },
    /// The wrong number of inputs was given.
    #[error("{found} inputs given; the program takes {expected} ({names})")]
    InputCount {
        /// How many the program takes (constants are not counted).
        expected: usize,
        /// How many were given.
        found: usize,
        /// The inputs' names.
        names: String,
    },
    /// An input has the wrong number of dimensions, or is a tensor instead of a number or the other way round.
    #[error("input `{input}` is {found}; the program takes {expected}")]
    InputKind {
        /// The input's name.
        input: String,
        /// What the program takes: `a tensor of 2 dimensions`.
        expected: String,
        /// What was given.
        found: String,
    },
    /// One dimension of an input has a size that the program does not take.
    #[error("input `{input}`: {dimension} is {found}; the program takes {expected}")]
    InputSize {
        /// The input's name.
        input: String,
        /// `dimension 0`; for an integer input, `its value`.
        dimension: String,
        /// What the program takes: `224`, `1 to 32 (s17)`, `2*s17 = 8`.
        expected: String,
        /// What was given.
        found: i128,
    },
}

fn at(place: &str) -> String {
    if place.is_empty() { String::new() } else { format!(" ({place})") }
}
