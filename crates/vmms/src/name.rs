//! Names of VMs.

use crate::error::{Error, Result, shortened};
use uuid::Uuid;

/// Most characters of a name (as Hyper-V's `New-VM` takes).
pub const MOST_CHARACTERS: usize = 100;

/// Checks a name. Nearly everything that can be typed is one: names never become file names.
///
/// # Errors
/// Says what is wrong with it.
pub fn check(name: &str) -> Result<()> {
    let bad = |why: String| Err(Error::BadName(format!("'{}' cannot be a VM's name: {why}", shortened(name))));
    let length = name.chars().count();
    if length == 0 {
        return bad("it is empty".into());
    }
    if length > MOST_CHARACTERS {
        return bad(format!("it has {length} characters, {MOST_CHARACTERS} are possible"));
    }
    if let Some(c) = name.chars().find(|c| {
        c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    }) {
        return bad(format!("it holds the control character U+{:04X}", u32::from(c)));
    }
    if name.contains('/') {
        return bad("it holds a slash, by which commands know the path of a control socket".into());
    }
    if name.trim() != name {
        return bad("it begins or ends with a space".into());
    }
    if name.starts_with('-') {
        return bad("it begins with '-', as options do".into());
    }
    if Uuid::try_parse(name).is_ok() {
        return bad("it looks like a VM's id".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["demo", "web server 2", "Müller & Söhne", "名前", "a.b:c*?", "..", "…", &"x".repeat(100)] {
            assert!(check(good).is_ok(), "{good}");
        }
        let id = Uuid::new_v4().to_string();
        for bad in
            ["", "a/b", "a\nb", "\u{1b}[31m", "a\u{7f}", " a", "a ", "-a", &id, &"x".repeat(10_000), "a\u{202e}b"]
        {
            let error = check(bad).unwrap_err().to_string();
            assert!(error.len() < 400 && !error.contains(['\n', '\u{1b}']), "{error}");
        }
    }
}
