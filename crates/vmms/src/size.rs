//! Sizes as people write them.

/// Bytes from "512M", "1G", "1.5G" is not one of them: a whole number and K, M, G or T (powers of 1024); without a
/// letter, MiB.
///
/// # Errors
/// In words for people.
pub fn parse(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 20),
    };
    // `u64::from_str` would take a plus sign too.
    let number = if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse::<u64>().ok() } else { None };
    let number = number.ok_or("expected a whole number with K, M, G or T, such as 512M or 2G")?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".into())
}

/// A memory size that a machine can have.
///
/// # Errors
/// In words for people.
pub fn memory(text: &str) -> Result<u64, String> {
    let bytes = parse(text)?;
    if !machine::config::MEMORY_BYTES.contains(&bytes) || bytes % (1 << 20) != 0 {
        return Err("a machine has a whole number of MiB from 2M to 1023G".into());
    }
    Ok(bytes)
}

/// As people write it, in the largest unit that leaves a whole number.
pub fn show(bytes: u64) -> String {
    for (shift, letter) in [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')] {
        if bytes > 0 && bytes % (1 << shift) == 0 {
            return format!("{}{letter}", bytes >> shift);
        }
    }
    format!("{bytes}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("1G", 1 << 30), ("512", 512 << 20), ("64k", 64 << 10), ("2T", 2 << 40)] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "12Q", "-1G", "+1G", "1.5G", "99999999999999999999", "16777216T", "1é"] {
            assert!(parse(text).is_err(), "{text}");
        }
        for text in ["0", "1M", "1024G", "900T", "2049K"] {
            assert!(memory(text).is_err(), "{text}");
        }
        assert_eq!(memory("2M"), Ok(2 << 20));
        for text in ["1G", "1536M", "2T", "3K"] {
            assert_eq!(show(parse(text).unwrap()), text);
        }
    }
}
