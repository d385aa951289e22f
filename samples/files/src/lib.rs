//! Keeps files on a volume, and does to them what it is asked.
//!
//! | method, path | does |
//! |---|---|
//! | `GET /PATH` | the file's content |
//! | `PUT /PATH` | writes the body to the file, and makes it durable |
//! | `POST /PATH?do=append` | adds the body at the file's end |
//! | `POST /PATH?do=size&n=N` | cuts it or lets it grow to N bytes |
//! | `POST /PATH?do=write&at=N` | writes the body at an offset |
//! | `POST /PATH?do=mkdir`, `rmdir`, `rm`, `list`, `stat` | what their names say |
//! | `POST /PATH?do=mv&to=PATH`, `do=symlink&to=TARGET`, `do=link&to=PATH` | the same |
//! | `POST /PATH?do=fill&n=N` | writes N files of one byte; how many there were room for |
//! | `POST /PATH?do=stream&n=N` | writes N bytes by a stream of the host's own; the host's word for what fails |
//! | `POST /PATH?do=unlinked&n=N` | writes N bytes to a file that it removed before |
//!
//! `PATH` is the path in the guest, percent-encoded where it must be: `PUT /data/a.txt`. What fails is
//! answered with 409 and the error.

#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};

use insula_sdk::{Error, Method, Request, Response, Result, StatusCode};

#[insula_sdk::main]
async fn handle(mut req: Request) -> Result<Response> {
    let path = req
        .query("path")
        .unwrap_or_else(|| req.uri().path().to_owned());
    let what = req.query("do").unwrap_or_default();
    let to = req.query("to").unwrap_or_default();
    let number = |name: &str| req.query(name).and_then(|text| text.parse::<u64>().ok());
    let (n, at) = (number("n").unwrap_or(0), number("at").unwrap_or(0));
    let body = req.bytes().await?;
    let done = match *req.method() {
        Method::GET => fs::read(&path),
        Method::PUT => put(&path, &body),
        Method::POST => act(&what, &path, &to, (n, at), &body),
        _ => {
            return Err(Error::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "GET, PUT or POST",
            ));
        }
    };
    Ok(match done {
        Ok(bytes) => Response::bytes("application/octet-stream", bytes),
        Err(error) => {
            let text = format!("{:?} {}\n", error.kind(), error.raw_os_error().unwrap_or(0));
            Response::text(text).with_status(StatusCode::CONFLICT)
        }
    })
}

fn put(path: &str, body: &[u8]) -> io::Result<Vec<u8>> {
    let mut file = File::create(path)?;
    file.write_all(body)?;
    file.sync_all()?;
    Ok(Vec::new())
}

fn act(what: &str, path: &str, to: &str, (n, at): (u64, u64), body: &[u8]) -> io::Result<Vec<u8>> {
    match what {
        "append" => OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)?
            .write_all(body)?,
        "size" => OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?
            .set_len(n)?,
        "write" => {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)?;
            file.seek(SeekFrom::Start(at))?;
            file.write_all(body)?;
        }
        "mkdir" => fs::create_dir(path)?,
        "rmdir" => fs::remove_dir(path)?,
        "rm" => fs::remove_file(path)?,
        "mv" => fs::rename(path, to)?,
        "link" => fs::hard_link(path, to)?,
        "symlink" => symlink(to, path)?,
        "stat" => return Ok(format!("{}\n", fs::symlink_metadata(path)?.len()).into()),
        "list" => return list(path),
        "fill" => return Ok(fill(path, n)),
        "unlinked" => return unlinked(path, n),
        "stream" => return stream(path, n),
        _ => return Err(io::ErrorKind::Unsupported.into()),
    }
    Ok(Vec::new())
}

#[cfg(target_os = "wasi")]
fn symlink(target: &str, path: &str) -> io::Result<()> {
    wasi_symlink(target, path)
}

#[cfg(not(target_os = "wasi"))]
fn symlink(target: &str, path: &str) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

/// std has no stable name for it; the host's own call does, below the first directory.
#[cfg(target_os = "wasi")]
fn wasi_symlink(target: &str, path: &str) -> io::Result<()> {
    let directories = wasip2::filesystem::preopens::get_directories();
    for (directory, root) in &directories {
        if let Some(rest) = path.strip_prefix(root.as_str()) {
            let made = directory.symlink_at(target, rest.trim_start_matches('/'));
            return made.map_err(|code| io::Error::other(format!("{code:?}")));
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// std knows no word for a stream that failed but EIO; the host has one.
#[cfg(target_os = "wasi")]
fn stream(path: &str, n: u64) -> io::Result<Vec<u8>> {
    use wasip2::filesystem::types::{DescriptorFlags, OpenFlags, PathFlags, filesystem_error_code};
    use wasip2::io::streams::StreamError;
    let directories = wasip2::filesystem::preopens::get_directories();
    let below = |(_, root): &&(_, String)| path.starts_with(root.as_str());
    let found = directories.iter().find(below);
    let (directory, root) = found.ok_or(io::ErrorKind::NotFound)?;
    let name = path[root.len()..].trim_start_matches('/');
    let flags = (OpenFlags::CREATE, DescriptorFlags::WRITE);
    let file = directory.open_at(PathFlags::empty(), name, flags.0, flags.1);
    let said = |code| io::Error::other(format!("{code:?}"));
    let file = file.map_err(said)?;
    let stream = file.write_via_stream(0).map_err(said)?;
    let mut left = n;
    while left > 0 {
        let piece = left.min(4096);
        let zeros = vec![0; usize::try_from(piece).unwrap_or(0)];
        match stream.blocking_write_and_flush(&zeros) {
            Ok(()) => left -= piece,
            Err(StreamError::Closed) => return Ok(b"closed".to_vec()),
            Err(StreamError::LastOperationFailed(error)) => {
                return Ok(format!("{:?}", filesystem_error_code(&error)).into());
            }
        }
    }
    Ok(b"whole".to_vec())
}

#[cfg(not(target_os = "wasi"))]
fn stream(_: &str, _: u64) -> io::Result<Vec<u8>> {
    Err(io::ErrorKind::Unsupported.into())
}

fn list(path: &str) -> io::Result<Vec<u8>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names
        .into_iter()
        .map(|name| name + "\n")
        .collect::<String>()
        .into())
}

/// As many files as there is room for; the error that came after them.
fn fill(path: &str, n: u64) -> Vec<u8> {
    for file in 0..n {
        if let Err(error) = fs::write(format!("{path}/{file}"), "x") {
            return format!("{file} {:?}\n", error.kind()).into();
        }
    }
    format!("{n}\n").into()
}

fn unlinked(path: &str, n: u64) -> io::Result<Vec<u8>> {
    let mut file = File::create(path)?;
    fs::remove_file(path)?;
    let piece = [7; 64 << 10];
    let mut left = n;
    while left > 0 {
        let next = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
        file.write_all(&piece[..next])?;
        left -= next as u64;
    }
    Ok(format!("{}\n", file.metadata()?.len()).into())
}

#[cfg(test)]
mod tests {
    use insula_sdk::test::{call, run};
    use insula_sdk::{Body, Method, Request, StatusCode};

    use super::handle;

    fn send(method: Method, uri: String, body: &'static str) -> (StatusCode, String) {
        run(async {
            let mut request = Request::post(&uri, Body::from(body));
            *request.method_mut() = method;
            let mut response = call(handle, request).await;
            (response.status(), response.body_mut().text().await.unwrap())
        })
    }

    #[test]
    fn keeps_files() {
        let dir = std::env::temp_dir().join(format!("insula-files-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let at = |name: &str| format!("{}/{name}", dir.display());
        let post = |uri: String| send(Method::POST, uri, "more");
        assert_eq!(send(Method::PUT, at("a"), "hello").0, StatusCode::OK);
        assert_eq!(post(at("a?do=append")).0, StatusCode::OK);
        assert_eq!(send(Method::GET, at("a"), "").1, "hellomore");
        assert_eq!(post(at("a?do=size&n=2")).0, StatusCode::OK);
        assert_eq!(post(at("a?do=write&at=4")).0, StatusCode::OK);
        assert_eq!(send(Method::GET, at("a"), "").1, "he\0\0more");
        assert_eq!(post(at("d?do=mkdir")).0, StatusCode::OK);
        assert_eq!(post(at("d?do=fill&n=3")).1, "3\n");
        assert_eq!(post(at("d?do=list")).1, "0\n1\n2\n");
        assert_eq!(post(at("s?do=symlink&to=a")).0, StatusCode::OK);
        assert_eq!(post(at("s?do=stat")).1, "1\n");
        assert_eq!(post(at("u?do=unlinked&n=100000")).1, "100000\n");
        assert_eq!(post(at("x?do=rm")).0, StatusCode::CONFLICT);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
