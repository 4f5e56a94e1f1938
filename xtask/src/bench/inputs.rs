//! What the real programs of `bench cpu` work on: made here, the same on every machine.

use std::fmt::Write;

/// A small generator with a fixed seed (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// All inputs as (file name, contents).
pub fn all() -> Vec<(&'static str, String)> {
    vec![
        ("program.c", c_program()),
        ("program.py", PYTHON.to_owned()),
        ("program.awk", AWK.to_owned()),
        ("text", text()),
    ]
}

/// A C program without headers: tables, loops, switches, structures and calls, as generated code has them.
fn c_program() -> String {
    let mut random = Random(0x5eed);
    let mut code = String::from(
        "typedef unsigned long u64; typedef unsigned int u32;\n\
         struct node { struct node *left, *right; u64 key; u32 weight; char name[12]; };\n\
         static u32 table[256];\n",
    );
    for number in 0..40 {
        let (a, b, c) = (random.below(97) + 2, random.below(31) + 1, random.below(255));
        let cases: String = (0..8 + random.below(8)).fold(String::new(), |mut text, case| {
            let _ = writeln!(text, "    case {case}: s += table[(s ^ i) & 255] * {}; break;", random.below(1000));
            text
        });
        let _ = write!(
            code,
            "static u32 f{number}(struct node *n, u32 count, u64 s) {{\n\
             \x20 for (u32 i = 0; i < count; i++) {{\n\
             \x20   switch ((s + i) % {a}) {{\n{cases}    default: s = (s >> {b}) | (s << (64 - {b}));\n    }}\n\
             \x20   if (n && n->key > s) {{ n->weight += i; n = n->left; }} else if (n) {{ s ^= n->key; n = n->right; }}\n\
             \x20 }}\n\
             \x20 double d = s & {c}; for (int k = 0; k < 9; k++) d = d * 1.5 + k / 3.0;\n\
             \x20 return (u32)(s + (u64)d);\n}}\n"
        );
    }
    code.push_str("u64 all(struct node *n, u32 count) {\n  u64 s = 1;\n");
    for number in 0..40 {
        let _ = writeln!(code, "  s = s * 31 + f{number}(n, count, s);");
    }
    code.push_str("  return s;\n}\n");
    code
}

/// Lines of words, about 6 MiB.
fn text() -> String {
    let mut random = Random(77);
    let mut text = String::new();
    while text.len() < 6 << 20 {
        for _ in 0..3 + random.below(9) {
            for _ in 0..2 + random.below(7) {
                text.push(char::from(b"eeeaaaiioouutnsrhldcmfpgwybvkxjq0123"[random.below(36) as usize]));
            }
            text.push(' ');
        }
        let _ = writeln!(text, "{}", random.below(100_000));
    }
    text
}

const AWK: &str = "\
{ for (i = 1; i <= NF; i++) { count[substr($i, 1, 3)]++; total += length($i) } sum += $NF * 1.25 }
END { for (key in count) if (count[key] > most) most = count[key]; printf \"%d %d %.2f\\n\", total, most, sum }
";

const PYTHON: &str = "\
import json
import re

class Account:
    def __init__(self, name):
        self.name = name
        self.balance = 0

    def move(self, amount):
        self.balance = (self.balance * 31 + amount) % 1000003
        return self.balance

accounts = {f'a{i}': Account(f'a{i}') for i in range(200)}
seed = 12345
for step in range(150000):
    seed = (seed * 1103515245 + 12345) & 0x7fffffff
    accounts[f'a{seed % 200}'].move(seed >> 7)
state = sorted((a.balance, n) for n, a in accounts.items())
text = json.dumps([{'n': n, 'b': b, 'w': [b % k for k in range(1, 20)]} for b, n in state])
words = re.findall(r'\"n\": \"(a\\d+)\", \"b\": (\\d+)', text)
primes = [n for n in range(2, 12000) if all(n % d for d in range(2, int(n ** 0.5) + 1))]
print(len(text), words[:3], sum(primes), sum(float(b) for _, b in words))
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_do_not_change() {
        let sizes: Vec<_> = all().iter().map(|(name, text)| (*name, text.lines().count())).collect();
        assert_eq!(all(), all());
        assert!(sizes.iter().all(|(_, lines)| *lines > 1), "{sizes:?}");
        let program = c_program();
        assert_eq!(program.matches('{').count(), program.matches('}').count());
    }
}
