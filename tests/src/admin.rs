//! The admin API.

use std::net::SocketAddr;

use serde_json::Value;

use crate::http::{Answer, Request};

/// A client of the admin API, with one token or none.
#[derive(Debug, Clone)]
pub struct Admin {
    address: SocketAddr,
    token: Option<String>,
}

impl Admin {
    /// A client for the API at `address`.
    #[must_use]
    pub const fn new(address: SocketAddr, token: Option<String>) -> Self {
        Self { address, token }
    }

    /// A request with the token, if there is one, and nothing else.
    pub fn request(&self, method: &str, path: &str) -> Request {
        let request = Request::new(self.address, &self.address.to_string(), method, path);
        match &self.token {
            Some(token) => request.header("authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    /// A request with a JSON document.
    pub fn json(&self, method: &str, path: &str, document: &Value) -> Request {
        let request = self.request(method, path);
        request
            .header("content-type", "application/json")
            .body(document.to_string())
    }

    /// An upload of a component.
    pub fn upload(&self, path: &str, component: impl Into<Vec<u8>>) -> Request {
        let request = self.request("POST", path);
        request
            .header("content-type", "application/wasm")
            .body(component)
    }

    /// An upload of an image.
    pub fn image(&self, path: &str, image: impl Into<Vec<u8>>) -> Request {
        let request = self.request("PUT", path);
        request
            .header("content-type", "application/octet-stream")
            .body(image)
    }

    fn done(what: &str, answer: &Answer) -> Value {
        let status = answer.status;
        assert!(
            (200..300).contains(&status),
            "{what}: {status} {}",
            answer.text()
        );
        if answer.body.is_empty() {
            Value::Null
        } else {
            answer.json()
        }
    }

    /// Gets a document.
    ///
    /// # Panics
    /// When it is refused.
    #[must_use]
    pub fn get(&self, path: &str) -> Value {
        Self::done(path, &self.request("GET", path).send())
    }

    /// Puts a document.
    ///
    /// # Panics
    /// When it is refused.
    pub fn put(&self, path: &str, document: &Value) -> Value {
        Self::done(path, &self.json("PUT", path, document).send())
    }

    /// Posts a document.
    ///
    /// # Panics
    /// When it is refused.
    pub fn post(&self, path: &str, document: &Value) -> Value {
        Self::done(path, &self.json("POST", path, document).send())
    }

    /// Deletes a thing.
    ///
    /// # Panics
    /// When it is refused.
    pub fn delete(&self, path: &str) {
        Self::done(path, &self.request("DELETE", path).send());
    }

    /// The names in a list, through all its parts.
    ///
    /// # Panics
    /// When the list is not as lists are.
    #[must_use]
    pub fn names(&self, path: &str) -> Vec<String> {
        let list = self.get(path);
        assert!(
            list["next"].is_null(),
            "a longer list than a test makes: {list}"
        );
        let items = list["items"]
            .as_array()
            .unwrap_or_else(|| panic!("no list: {list}"));
        let name = |item: &Value| item["name"].as_str().map(str::to_owned);
        items
            .iter()
            .map(|item| name(item).unwrap_or_else(|| panic!("no name: {item}")))
            .collect()
    }
}
