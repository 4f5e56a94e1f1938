//! Secure Boot: signature databases, X.509 certificates, PKCS#7 signatures, and the rule that says which image runs
//! (UEFI 2.10, chapter 32).
//!
//! Validity dates of certificates are never looked at: firmware has no trusted time, and the certificates that sign
//! today's boot loaders have expired (UEFI 2.10, section 32.5.3.3 allows it; every PC's firmware does it).

pub mod hash;
pub mod image;
pub mod pkcs7;
pub mod sigdb;
pub mod x509;
