//! Downloading over HTTP, going on where an earlier download stopped.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use ureq::http::{HeaderMap, Response, header};
use ureq::{Agent, Body};

use super::part::Part;
use super::{Error, Options, archive};

/// The path in a `file://` address; `None` for one that is to be fetched.
pub(super) fn local_path(url: &str) -> Result<Option<PathBuf>, Error> {
    let refused = || Error::Url(url.to_owned());
    let (scheme, rest) = url.split_once("://").ok_or_else(refused)?;
    match scheme.to_ascii_lowercase().as_str() {
        "http" | "https" => Ok(None),
        "file" => {
            let path = rest.strip_prefix("localhost").unwrap_or(rest);
            if path.starts_with('/') {
                Ok(Some(PathBuf::from(percent_decoded(path).ok_or_else(refused)?)))
            } else {
                Err(refused())
            }
        }
        _ => Err(refused()),
    }
}

/// Fills the part with the archive of that digest. What is there already is used; should the whole
/// then turn out wrong, it is fetched once more from its first byte.
pub(super) fn fetch(part: &mut Part, options: &Options, sha256: &str) -> Result<(), Error> {
    let url = options.url.as_str();
    let path = part.path().to_path_buf();
    if part.len()? > 0 {
        if archive::sha256(part.file(), &path)? == sha256 {
            return Ok(());
        }
        if part.version(url).is_none() {
            part.clear()?;
        }
    }
    let mut download = Download::new(url, options.retry_pause);
    let mut resumed = download.run(part)?;
    loop {
        let found = archive::sha256(part.file(), &path)?;
        if found == sha256 {
            return Ok(());
        }
        part.clear()?;
        if !resumed {
            let expected = sha256.to_owned();
            return Err(Error::WrongDigest { url: url.into(), expected, found });
        }
        // Pieces of two versions, maybe: once more, and this time the digest decides.
        download.run(part)?;
        resumed = false;
    }
}

/// Attempts in a row that bring nothing new.
const ATTEMPTS: u32 = 5;
/// What an attempt must bring to count as progress.
const PROGRESS: u64 = 1 << 20;
/// An archive that is larger is not CIFAR-10, which has 170 MB.
const MOST_BYTES: u64 = 2 << 30;

struct Download<'a> {
    url: &'a str,
    retry_pause: Duration,
    agent: Agent,
    bar: ProgressBar,
}

/// How an attempt ended, when not with a fatal error.
enum Attempt {
    Done,
    /// To be tried again, and why.
    Broken(String),
}

impl<'a> Download<'a> {
    fn new(url: &'a str, retry_pause: Duration) -> Self {
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("vq-xtask/", env!("CARGO_PKG_VERSION")))
            // The archive's own bytes, whose positions the ranges count.
            .accept_encoding("identity")
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_mins(1)))
            .timeout_per_read(Some(Duration::from_mins(1)));
        if url.starts_with("http://127.0.0.1") || url.starts_with("http://localhost") {
            // No proxy reaches this machine's own loopback.
            config = config.proxy(None);
        }
        let bar = ProgressBar::no_length();
        let template = "{msg} {bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self { url, retry_pause, agent: config.build().new_agent(), bar }
    }

    /// Downloads until the server has no more to send. Says whether an earlier part was used.
    fn run(&mut self, part: &mut Part) -> Result<bool, Error> {
        let mut resumed = part.len()? > 0;
        let mut attempt = 1;
        loop {
            let before = part.len()?;
            match self.attempt(part)? {
                Attempt::Done => {
                    self.bar.finish_and_clear();
                    return Ok(resumed);
                }
                Attempt::Broken(reason) => {
                    if part.len()? >= before.saturating_add(PROGRESS) {
                        attempt = 1;
                    } else if attempt == ATTEMPTS {
                        self.bar.finish_and_clear();
                        let (url, attempts) = (self.url.to_owned(), ATTEMPTS);
                        return Err(Error::GaveUp { url, attempts, reason });
                    } else {
                        attempt += 1;
                    }
                    resumed = resumed || part.len()? > 0;
                    self.bar.set_message(format!("{reason}; trying again"));
                    std::thread::sleep(self.retry_pause * 2_u32.pow(attempt.saturating_sub(2)));
                }
            }
        }
    }

    fn attempt(&mut self, part: &mut Part) -> Result<Attempt, Error> {
        let have = part.len()?;
        let mut request = self.agent.get(self.url);
        if have > 0 {
            request = request.header(header::RANGE, format!("bytes={have}-"));
            if let Some(version) = part.version(self.url).filter(|v| !v.is_empty()) {
                request = request.header(header::IF_RANGE, version);
            }
        }
        let response = match request.call() {
            Ok(response) => response,
            Err(error) => return self.failed(error),
        };
        let status = response.status().as_u16();
        let headers = response.headers();
        let range = headers.get(header::CONTENT_RANGE).and_then(|v| v.to_str().ok());
        let total = match status {
            206 if have > 0 => match range.and_then(parse_content_range) {
                Some((start, total)) if start == have => total,
                _ => {
                    part.clear()?;
                    return Ok(Attempt::Broken("the server sent another range".to_owned()));
                }
            },
            // All of it: the first attempt, a server without ranges, or another version by now.
            200 => {
                part.clear()?;
                part.set_version(self.url, &version(headers))?;
                content_length(headers)
            }
            // Nothing lies beyond what is here: it is whole, or of a longer, older version.
            416 if have > 0 => {
                let size = range.and_then(|r| r.strip_prefix("bytes */")?.trim().parse().ok());
                if size == Some(have) {
                    return Ok(Attempt::Done);
                }
                part.clear()?;
                return Ok(Attempt::Broken("the archive has changed".to_owned()));
            }
            408 | 425 | 429 | 500..=599 => {
                return Ok(Attempt::Broken(format!("the server answered {status}")));
            }
            _ => return Err(Error::Status { url: self.url.to_owned(), status }),
        };
        self.receive(part, response, total)
    }

    /// Appends the body to the part.
    fn receive(
        &mut self,
        part: &mut Part,
        mut response: Response<Body>,
        total: Option<u64>,
    ) -> Result<Attempt, Error> {
        let mut have = part.len()?;
        if let Some(total) = total {
            self.bar.set_length(total);
        }
        self.bar.set_message("CIFAR-10");
        self.bar.set_position(have);
        self.bar.reset_eta();
        let path = part.path().to_path_buf();
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Ok(Attempt::Broken(broken_off(have, total, &error.to_string())));
                }
            };
            if n == 0 {
                break;
            }
            part.file().write_all(&buffer[..n]).map_err(Error::io("write", &path))?;
            have += n as u64;
            self.bar.set_position(have);
            if have > MOST_BYTES {
                part.clear()?;
                let reason = "it sends far more than CIFAR-10's archive has".to_owned();
                return Err(Error::Unreachable { url: self.url.to_owned(), reason });
            }
        }
        match total {
            Some(total) if have < total => {
                Ok(Attempt::Broken(broken_off(have, Some(total), "the connection was closed")))
            }
            _ => Ok(Attempt::Done),
        }
    }

    /// Errors of the connection are worth another attempt, all others are not.
    fn failed(&self, error: ureq::Error) -> Result<Attempt, Error> {
        use ureq::Error as E;
        match error {
            E::Io(_) | E::Timeout(_) | E::ConnectionFailed | E::Protocol(_) => {
                Ok(Attempt::Broken(error.to_string()))
            }
            E::BadUri(_) | E::Http(_) => Err(Error::Url(self.url.to_owned())),
            error => {
                Err(Error::Unreachable { url: self.url.to_owned(), reason: error.to_string() })
            }
        }
    }
}

fn broken_off(have: u64, total: Option<u64>, reason: &str) -> String {
    match total {
        Some(total) => format!("{reason} after {have} of {total} bytes"),
        None => format!("{reason} after {have} bytes"),
    }
}

/// What a later request for the rest can name the version by: a strong `ETag`, else the date.
fn version(headers: &HeaderMap) -> String {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    text(header::ETAG)
        .filter(|tag| !tag.starts_with("W/"))
        .or_else(|| text(header::LAST_MODIFIED))
        .unwrap_or_default()
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

/// `bytes START-END/TOTAL` → (START, TOTAL); TOTAL may be `*`.
fn parse_content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(first);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let path = |url| local_path(url).expect("an address");
        assert_eq!(path("https://a/b.tar.gz"), None);
        assert_eq!(path("file:///a/b%20c.tar.gz"), Some(PathBuf::from("/a/b c.tar.gz")));
        assert_eq!(path("file://localhost/a"), Some(PathBuf::from("/a")));
        for url in
            ["a.tar.gz", "ftp://a/b", "file://a/b", "file:///a%2", "file:///%zz", "file:///%ff"]
        {
            assert!(local_path(url).is_err(), "{url}");
        }
    }

    #[test]
    fn content_ranges() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(parse_content_range("bytes */10"), None);
        assert_eq!(parse_content_range("5-9/10"), None);
    }
}
