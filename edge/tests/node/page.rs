//! What a reader of the page asks a running node.

use std::io::{Read, Write};

use serde_json::Value;

use super::{Node, connect, wait_until};

impl Node {
    /// Head and body of a GET.
    pub fn fetch(&self, path: &str) -> (String, Vec<u8>) {
        let line = self.wait_for_log("\"http_address\":\"");
        let address = line.split("\"http_address\":\"").nth(1).unwrap();
        let mut stream = connect(address.split('"').next().unwrap().parse().unwrap());
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|part| part == b"\r\n\r\n");
        let body = answer.split_off(end.unwrap() + 4);
        (String::from_utf8(answer).unwrap(), body)
    }

    /// Head and body of a GET as text.
    pub fn text(&self, path: &str) -> String {
        let (head, body) = self.fetch(path);
        head + &String::from_utf8_lossy(&body)
    }

    /// The JSON of a GET; null where there is none.
    pub fn json(&self, path: &str) -> Value {
        serde_json::from_slice(&self.fetch(path).1).unwrap_or(Value::Null)
    }

    /// Waits until so many slices are analysed since the start.
    pub fn wait_until_analysed(&self, n_slices: u64) {
        let n_analysed = || self.json("/api/status")["analysed"].as_u64();
        wait_until(&format!("{n_slices} analysed slices"), || {
            n_analysed().is_some_and(|n_analysed| n_analysed >= n_slices)
        });
    }

    /// Waits until a study is complete and so many slices of it are known.
    pub fn complete(&self, study_uid: &str, n_slices: usize) -> Value {
        let path = format!("/api/studies/{study_uid}");
        let mut result = Value::Null;
        wait_until(&format!("study of {n_slices} slices is complete"), || {
            result = self.json(&path);
            result["state"] == "complete" && result["slices"] == n_slices
        });
        result
    }
}
