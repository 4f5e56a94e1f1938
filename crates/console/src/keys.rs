//! Text and names of keys as scan codes of set 1, on a keyboard with the US layout.

use thiserror::Error;

/// A key goes down or up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stroke {
    /// Make code of set 1.
    pub code: u16,
    /// With the prefix E0.
    pub extended: bool,
    /// Down, or up.
    pub down: bool,
}

/// Why something cannot be typed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KeyError {
    /// No key makes this character.
    #[error("no key of a US keyboard makes the character {0:?}")]
    Character(char),
    /// No such key.
    #[error("there is no key named '{0}'; known: {list}, and combinations such as ctrl-alt-delete", list = NAMES.map(|n| n.0).join(", "))]
    Name(String),
}

/// Characters of the codes from 0x02 on, without and with shift.
const PLAIN: &[u8; 52] = b"1234567890-=\x08\tqwertyuiop[]\n\0asdfghjkl;'`\0\\zxcvbnm,./";
const SHIFTED: &[u8; 52] = b"!@#$%^&*()_+\x08\tQWERTYUIOP{}\n\0ASDFGHJKL:\"~\0|ZXCVBNM<>?";
const SHIFT: u16 = 0x2a;
const SPACE: u16 = 0x39;

/// Names of keys: code, extended.
const NAMES: [(&str, u16, bool); 37] = [
    ("enter", 0x1c, false),
    ("esc", 0x01, false),
    ("backspace", 0x0e, false),
    ("tab", 0x0f, false),
    ("space", SPACE, false),
    ("up", 0x48, true),
    ("down", 0x50, true),
    ("left", 0x4b, true),
    ("right", 0x4d, true),
    ("home", 0x47, true),
    ("end", 0x4f, true),
    ("pageup", 0x49, true),
    ("pagedown", 0x51, true),
    ("insert", 0x52, true),
    ("delete", 0x53, true),
    ("f1", 0x3b, false),
    ("f2", 0x3c, false),
    ("f3", 0x3d, false),
    ("f4", 0x3e, false),
    ("f5", 0x3f, false),
    ("f6", 0x40, false),
    ("f7", 0x41, false),
    ("f8", 0x42, false),
    ("f9", 0x43, false),
    ("f10", 0x44, false),
    ("f11", 0x57, false),
    ("f12", 0x58, false),
    ("ctrl", 0x1d, false),
    ("shift", SHIFT, false),
    ("alt", 0x38, false),
    ("rctrl", 0x1d, true),
    ("ralt", 0x38, true),
    ("rshift", 0x36, false),
    ("win", 0x5b, true),
    ("menu", 0x5d, true),
    ("capslock", 0x3a, false),
    ("print", 0x37, true),
];

/// Key and shift for a character.
fn key_of(c: char) -> Option<(u16, bool)> {
    if c == ' ' {
        return Some((SPACE, false));
    }
    let byte = u8::try_from(c).ok().filter(|b| *b != 0)?;
    let at = |table: &[u8; 52]| table.iter().position(|b| *b == byte).map(|i| i as u16 + 2);
    at(PLAIN).map(|code| (code, false)).or_else(|| at(SHIFTED).map(|code| (code, true)))
}

/// The strokes that type a text. A line feed is the Enter key.
///
/// # Errors
/// For a character that the keyboard does not have.
pub fn text(text: &str) -> Result<Vec<Stroke>, KeyError> {
    let mut strokes = Vec::new();
    for c in text.chars().filter(|c| *c != '\r') {
        let (code, shifted) = key_of(c).ok_or(KeyError::Character(c))?;
        let mut push = |code, down| strokes.push(Stroke { code, extended: false, down });
        if shifted {
            push(SHIFT, true);
        }
        push(code, true);
        push(code, false);
        if shifted {
            push(SHIFT, false);
        }
    }
    Ok(strokes)
}

/// The strokes of one key or a combination, as `f2`, `ctrl-c`, `ctrl-alt-delete`: down in this order, up in reverse.
///
/// # Errors
/// For an unknown name.
pub fn named(name: &str) -> Result<Vec<Stroke>, KeyError> {
    let lower = name.to_ascii_lowercase();
    let unknown = || KeyError::Name(name.to_owned());
    // A lone hyphen is a key, too.
    let parts: Vec<&str> = if lower == "-" { vec!["-"] } else { lower.split('-').collect() };
    let mut keys = Vec::new();
    for part in parts {
        let mut characters = part.chars();
        let key = match (characters.next(), characters.next()) {
            (Some(c), None) => key_of(c).map(|(code, _)| (code, false)),
            _ => NAMES.iter().find(|n| n.0 == part).map(|n| (n.1, n.2)),
        };
        keys.push(key.ok_or_else(unknown)?);
    }
    let strokes = |down| move |(code, extended): &(u16, bool)| Stroke { code: *code, extended: *extended, down };
    Ok(keys.iter().map(strokes(true)).chain(keys.iter().rev().map(strokes(false))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(strokes: &[Stroke]) -> Vec<(u16, bool)> {
        strokes.iter().map(|s| (s.code, s.down)).collect()
    }

    #[test]
    fn letters_digits_and_shift() {
        assert_eq!(
            codes(&text("a1\n").unwrap()),
            [(30, true), (30, false), (2, true), (2, false), (28, true), (28, false)]
        );
        assert_eq!(codes(&text("A").unwrap()), [(42, true), (30, true), (30, false), (42, false)]);
        assert_eq!(codes(&text("|").unwrap())[1], (0x2b, true));
        assert_eq!(text("grün").unwrap_err(), KeyError::Character('ü'));
        assert_eq!(text("\0").unwrap_err(), KeyError::Character('\0'));
    }

    #[test]
    fn every_printable_character_has_a_key() {
        let all: String = (b' '..=b'~').map(char::from).collect();
        text(&all).unwrap();
    }

    #[test]
    fn combinations() {
        let strokes = named("Ctrl-Alt-Delete").unwrap();
        assert_eq!(codes(&strokes), [(29, true), (56, true), (83, true), (83, false), (56, false), (29, false)]);
        assert!(strokes[2].extended && !strokes[0].extended);
        assert_eq!(codes(&named("-").unwrap()), [(12, true), (12, false)]);
        assert!(named("ctrl-").is_err());
        assert!(named("f13").unwrap_err().to_string().contains("pageup"));
    }
}
