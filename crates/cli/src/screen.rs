//! `viridian screenshot` and `viridian type`: screen and keyboard of a running machine.

use crate::failure::{Failure, Outcome};
use crate::vm::target::Target;
use clap::Args as ClapArgs;
use std::path::PathBuf;
use worker::control::schema::Keys;

/// Arguments of `screenshot`.
#[derive(ClapArgs)]
pub struct ScreenshotArgs {
    /// The machine's name (`viridian run --name`), or the path of its control socket
    name: String,
    /// PNG to write
    file: PathBuf,
    #[command(flatten)]
    store: crate::StoreArgs,
}

/// Arguments of `type`.
#[derive(ClapArgs)]
pub struct TypeArgs {
    /// The machine's name (`viridian run --name`), or the path of its control socket
    name: String,
    /// Text, for a keyboard with the US layout; \n is Enter, \t Tab, \\ a backslash
    #[arg(default_value = "", hide_default_value = true)]
    text: String,
    /// Key or combination to press after the text: enter, esc, f2, up, ctrl-alt-delete; may be given several times
    #[arg(long, value_name = "KEY")]
    key: Vec<String>,
    #[command(flatten)]
    store: crate::StoreArgs,
}

/// Writes a picture of the screen.
pub fn screenshot(args: &ScreenshotArgs) -> Outcome {
    let png = Target::find(&args.store.open()?, &args.name)?.client()?.screenshot()?;
    std::fs::write(&args.file, png).map_err(|e| Failure::usage(format!("{}: {e}", args.file.display())))
}

/// Types.
pub fn type_keys(args: TypeArgs) -> Outcome {
    if args.text.is_empty() && args.key.is_empty() {
        return Err(Failure::usage("there is nothing to type: give TEXT or --key"));
    }
    let client = Target::find(&args.store.open()?, &args.name)?.client()?;
    Ok(client.type_keys(&Keys { text: unescape(&args.text), keys: args.key })?)
}

fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        match (c, c == '\\') {
            (_, true) => match characters.next() {
                Some('n') => out.push('\n'),
                Some('t') => out.push('\t'),
                Some('\\') => out.push('\\'),
                // Paths of UEFI are full of backslashes: others stand for themselves.
                Some(other) => out.extend(['\\', other]),
                None => out.push('\\'),
            },
            (c, false) => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::unescape;

    #[test]
    fn escapes() {
        assert_eq!(unescape(r"ls fs0:\EFI\n"), "ls fs0:\\EFI\n".replace("\\\\", "\\"));
        assert_eq!(unescape(r"a\q\"), "a\\q\\");
    }
}
