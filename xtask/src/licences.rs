//! Licences and sources of everything we depend on, checked against `deny.toml` where
//! `cargo-deny` itself is not installed.

use std::fs;

use anyhow::{Context, Result};

use crate::repository::{Repository, metadata};

/// All that `deny.toml` does not allow, a line each.
pub(crate) fn violations(repository: &Repository) -> Result<Vec<String>> {
    let text = fs::read_to_string(repository.root.join("deny.toml")).context("deny.toml")?;
    let allowed = allowed(&text).context("deny.toml has no list `allow`")?;
    let metadata = metadata(&repository.root, &[])?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let mut found = Vec::new();
    for package in packages {
        // Packages of this repository have no source.
        let Some(source) = package["source"].as_str() else {
            continue;
        };
        let name = format!("{} {}", package["name"], package["version"]).replace('"', "");
        if !source.starts_with("registry+") && !source.starts_with("sparse+") {
            found.push(format!("{name}: from {source}, not from a registry"));
        }
        match package["license"].as_str() {
            Some(terms) if permits(terms, &allowed) => {}
            Some(terms) => found.push(format!("{name}: {terms} is not allowed by deny.toml")),
            None => found.push(format!("{name}: names no licence")),
        }
    }
    Ok(found)
}

/// The texts of the first list called `allow`.
fn allowed(text: &str) -> Option<Vec<String>> {
    let (_, rest) = text.split_once("\nallow = [")?;
    let (list, _) = rest.split_once(']')?;
    let texts = list.split('"').skip(1).step_by(2);
    Some(texts.map(str::to_owned).collect())
}

/// Whether one of the alternatives of an SPDX expression is allowed. `AND` binds more tightly
/// than `OR`; a nested `OR` is read as an alternative, which no licence here gets wrong.
fn permits(terms: &str, allowed: &[String]) -> bool {
    let flat = terms.replace(['(', ')'], "").replace('/', " OR ");
    let one = |terms: &str| {
        let terms = terms.trim();
        allowed.iter().any(|allowed| allowed == terms)
    };
    flat.split(" OR ").any(|all| all.split(" AND ").all(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms() {
        let text = "[licenses]\nallow = [\n  \"MIT\",\n  \"Apache-2.0\", # ours\n]\n";
        let allowed = allowed(text).unwrap();
        assert_eq!(allowed, ["MIT", "Apache-2.0"]);
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-3.0 OR MIT",
            "(MIT OR X) AND Apache-2.0",
        ] {
            assert!(permits(good, &allowed), "{good}");
        }
        for bad in ["GPL-3.0", "MIT AND GPL-3.0", ""] {
            assert!(!permits(bad, &allowed), "{bad}");
        }
    }
}
