//! A small HTTP server on the loopback and archives to serve with it.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// The size of a data file in the tests' archives.
pub(crate) const FILE_BYTES: u64 = 9_000;

/// What the tests look at in a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) range: Option<String>,
    pub(crate) if_range: Option<String>,
    pub(crate) accept_encoding: Option<String>,
}

impl Request {
    /// The first byte asked for.
    pub(crate) fn start(&self) -> Option<usize> {
        self.range.as_ref()?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    /// Close the connection after this many bytes of the body.
    pub(crate) cut: Option<usize>,
}

impl Reply {
    pub(crate) fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), cut: None }
    }

    /// All of a file, without support for ranges.
    pub(crate) fn whole(body: &[u8]) -> Self {
        Self { body: body.to_vec(), ..Self::status(200) }
    }

    /// What a server with ranges and strong tags answers.
    pub(crate) fn ranged(body: &[u8], tag: &str, request: &Request) -> Self {
        let tag_header = ("ETag", tag.to_owned());
        let same = request.if_range.as_ref().is_none_or(|wanted| wanted == tag);
        match request.start() {
            Some(start) if same && start < body.len() => {
                let range = format!("bytes {start}-{}/{}", body.len() - 1, body.len());
                let headers = vec![tag_header, ("Content-Range", range)];
                Self { headers, body: body[start..].to_vec(), ..Self::status(206) }
            }
            Some(_) if same => {
                let range = format!("bytes */{}", body.len());
                Self { headers: vec![("Content-Range", range)], ..Self::status(416) }
            }
            _ => Self { headers: vec![tag_header], ..Self::whole(body) },
        }
    }

    pub(crate) fn cut(mut self, bytes: usize) -> Self {
        self.cut = Some(bytes);
        self
    }
}

pub(crate) struct Server {
    pub(crate) url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Answers the requests one after the other: the handler gets their number, from 0.
    pub(crate) fn start(handler: impl Fn(usize, &Request) -> Reply + Send + 'static) -> Self {
        const MOST_REQUESTS: usize = 30;
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket option");
        let url = format!("http://{}/cifar.tar.gz", listener.local_addr().expect("bound"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        std::thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_mins(1);
            let mut count = 0;
            while count < MOST_REQUESTS && Instant::now() < deadline {
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                stream.set_nonblocking(false).expect("a socket option");
                let request = read_request(&stream);
                seen.lock().expect("not poisoned").push(request.clone());
                answer(stream, &handler(count, &request));
                count += 1;
            }
        });
        Self { url, requests }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("not poisoned").clone()
    }
}

fn read_request(stream: &TcpStream) -> Request {
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket option");
    let mut request = Request::default();
    for line in BufReader::new(stream).lines() {
        let line = line.expect("a line");
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            let value = Some(value.trim().to_owned());
            match name.to_ascii_lowercase().as_str() {
                "range" => request.range = value,
                "if-range" => request.if_range = value,
                "accept-encoding" => request.accept_encoding = value,
                _ => {}
            }
        }
    }
    request
}

fn answer(mut stream: TcpStream, reply: &Reply) {
    let mut head = format!(
        "HTTP/1.1 {} Answer\r\nContent-Length: {}\r\nConnection: close\r\n",
        reply.status,
        reply.body.len()
    );
    for (name, value) in &reply.headers {
        head += &[name, ": ", value, "\r\n"].concat();
    }
    head += "\r\n";
    let end = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
    // The client may have gone.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&reply.body[..end]));
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let digits = hash.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.filter_map(|digit| char::from_digit(u32::from(digit), 16)).collect()
}

/// Bytes that do not compress.
pub(crate) fn noise(count: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..count).map(|_| next()).collect()
}

pub(crate) type Tar = Builder<GzEncoder<Vec<u8>>>;

/// A tar.gz of the six files (of `file_bytes` each) and the names, and what `more` adds.
pub(crate) fn archive_of(file_bytes: u64, more: impl FnOnce(&mut Tar)) -> Vec<u8> {
    let mut tar = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    add(&mut tar, "cifar-10-batches-bin/", EntryType::Directory, b"", "");
    for (i, file) in xtask::download_cifar::FILES.iter().enumerate() {
        let data = if file_bytes == FILE_BYTES {
            noise(file_bytes as usize, i as u32)
        } else {
            vec![0; file_bytes as usize]
        };
        let name = format!("cifar-10-batches-bin/{file}");
        add(&mut tar, &name, EntryType::Regular, &data, "");
    }
    let name = "cifar-10-batches-bin/batches.meta.txt";
    add(&mut tar, name, EntryType::Regular, b"airplane\n", "");
    more(&mut tar);
    tar.into_inner().and_then(GzEncoder::finish).expect("written to memory")
}

pub(crate) fn archive() -> Vec<u8> {
    archive_of(FILE_BYTES, |_| {})
}

/// Adds an entry whose name the tar crate itself would refuse to write.
pub(crate) fn add(tar: &mut Tar, name: &str, kind: EntryType, data: &[u8], link: &str) {
    let mut header = Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    // The link's name lies at byte 157 of the header.
    header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(data.len() as u64);
    header.set_cksum();
    tar.append(&header, data).expect("written to memory");
}
