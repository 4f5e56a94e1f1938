//! How a command fails: one clear line, and an exit status.

use std::process::ExitCode;

/// A message for people, and the status.
#[derive(Debug)]
pub struct Failure {
    /// One line.
    pub message: String,
    /// See the table in `main.rs`.
    pub status: u8,
}

/// The result of a command.
pub type Outcome = Result<(), Failure>;

impl Failure {
    /// Arguments, or files that they name, are of no use.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: 2 }
    }

    /// The host or the guest failed.
    pub fn host(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: 1 }
    }
}

impl From<vmms::Error> for Failure {
    fn from(error: vmms::Error) -> Self {
        Self { status: error.status(), message: error.to_string() }
    }
}

impl From<worker::control::client::ClientError> for Failure {
    fn from(error: worker::control::client::ClientError) -> Self {
        vmms::Error::from(error).into()
    }
}

/// The end of a command.
pub fn report(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}

/// Prints JSON for a program that reads standard output.
pub fn print_json(value: &impl serde::Serialize) -> Outcome {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::host(e.to_string()))?;
    println!("{text}");
    Ok(())
}
