//! `viridian completions` and `viridian man`.

use crate::failure::{Failure, Outcome};
use clap::{Args as ClapArgs, CommandFactory};
use std::io::Write;
use std::path::PathBuf;

/// Arguments of `completions`.
#[derive(ClapArgs)]
pub struct CompletionArgs {
    /// The shell: `source <(viridian completions bash)` in ~/.bashrc, for example
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

/// Arguments of `man`.
#[derive(ClapArgs)]
pub struct ManArgs {
    /// Folder for the pages, such as ~/.local/share/man/man1
    folder: PathBuf,
}

/// Prints the completions.
pub fn completions(args: &CompletionArgs) -> Outcome {
    let mut command = crate::Cli::command();
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "viridian", &mut text);
    // A reader that has seen enough is no failure.
    let _ = std::io::stdout().write_all(&text);
    Ok(())
}

/// Writes the pages.
pub fn man(args: &ManArgs) -> Outcome {
    let failed = |e: std::io::Error| Failure::host(format!("{}: {e}", args.folder.display()));
    std::fs::create_dir_all(&args.folder).map_err(failed)?;
    clap_mangen::generate_to(crate::Cli::command(), &args.folder).map_err(failed)
}
