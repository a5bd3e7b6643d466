//! A running `edge serve`, and a DICOM client that can misbehave: what the tests of the node share.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses a part of what all of them share"
)]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a step that fails fails its test"
)]

pub mod certificates;
mod page;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dicom_ul::pdu::{
    AssociationAC, AssociationRJ, AssociationRQ, PDataValue, PDataValueType, Pdu,
    PresentationContextProposed, UserVariableItem,
};
use dicom_ul::{read_pdu, write_pdu};

pub const CT: &str = "1.2.840.10008.5.1.4.1.1.2";
pub const ECHO: &str = "1.2.840.10008.1.1";
pub const EXPLICIT: &str = "1.2.840.10008.1.2.1";
pub const IMPLICIT: &str = "1.2.840.10008.1.2";
pub const RLE: &str = "1.2.840.10008.1.2.5";
pub const JPEG_LOSSLESS: &str = "1.2.840.10008.1.2.4.70";
pub const JPEG_BASELINE: &str = "1.2.840.10008.1.2.4.50";
/// Longer than anything here takes; only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A node and the folder that it keeps its state in.
pub struct Node {
    child: Child,
    pub dicom: SocketAddr,
    pub folder: Arc<tempfile::TempDir>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Node {
    /// Starts with settings beside ports and folder.
    pub fn start(settings: &str) -> Self {
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), settings)
    }

    pub fn start_in(folder: Arc<tempfile::TempDir>, settings: &str) -> Self {
        let config = write_config(folder.path(), settings);
        let mut child = Command::new(env!("CARGO_BIN_EXE_edge"))
            .args(["serve", "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                kept.lock().unwrap().push(line);
            }
        });
        let mut node = Self {
            child,
            dicom: SocketAddr::from(([127, 0, 0, 1], 0)),
            folder,
            log,
        };
        drop(reader);
        let line = node.wait_for_log("\"dicom_address\":\"");
        let address = line.split("\"dicom_address\":\"").nth(1).unwrap();
        node.dicom = address.split('"').next().unwrap().parse().unwrap();
        node
    }

    /// Waits for a line of the log that contains a text. A peer may see the end of its connection before the line about it is written.
    pub fn wait_for_log(&self, wanted: &str) -> String {
        let line = || self.log().into_iter().find(|line| line.contains(wanted));
        let is_there = || line().is_some();
        wait_until(&format!("a line with {wanted} in the log"), is_there);
        line().unwrap()
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    pub fn reload(&self, settings: &str) {
        let lines = self.log().len();
        write_config(self.folder.path(), settings);
        self.signal(rustix::process::Signal::HUP);
        let is_said = |line: &String| line.contains("reloaded");
        wait_until("the reload", || self.log()[lines..].iter().any(is_said));
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let id = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(id, signal).unwrap();
    }

    /// SIGTERM, then waits for the end.
    pub fn stop(mut self) -> (ExitStatus, Arc<tempfile::TempDir>) {
        self.signal(rustix::process::Signal::TERM);
        (self.wait(), Arc::clone(&self.folder))
    }

    pub fn kill(mut self) -> Arc<tempfile::TempDir> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        Arc::clone(&self.folder)
    }

    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the end of the node", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Waits until the node has read all that came on a connection to it: nothing is left in the kernel (proc_net_tcp(5)).
    pub fn wait_until_read(&self, stream: &TcpStream) {
        let port = |address: SocketAddr| format!(":{:04X}", address.port());
        let (theirs, ours) = (port(self.dicom), port(stream.local_addr().unwrap()));
        wait_until("the node has read what was sent", || {
            let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
            table.lines().any(|line| {
                let columns: Vec<&str> = line.split_whitespace().collect();
                columns[1].ends_with(&theirs)
                    && columns[2].ends_with(&ours)
                    && columns[4].ends_with(":00000000")
            })
        });
    }

    pub fn spooled(&self) -> Vec<Spooled> {
        spooled(self.folder.path())
    }

    /// Whether a C-ECHO is answered.
    pub fn is_alive(&self) -> bool {
        let mut client = Client::open(self.dicom, &[(ECHO, &[IMPLICIT])]).unwrap();
        let status = client.echo(1).unwrap();
        client.release();
        status == 0
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Writes a configuration into a folder that is the node's own.
pub fn write_config(folder: &Path, settings: &str) -> PathBuf {
    let config = folder.join("edge.toml");
    let text = format!(
        "dicom_bind = \"127.0.0.1\"\ndicom_port = 0\nhttp_bind = \"127.0.0.1:0\"\nstate_dir = \"state\"\n{settings}"
    );
    // A folder in memory has less room than the shipped watermark.
    let text = if text.contains("keep_free_mib") {
        text
    } else if text.contains("[retention]") {
        text.replace("[retention]", "[retention]\nkeep_free_mib = 1")
    } else {
        format!("{text}\n[retention]\nkeep_free_mib = 1\n")
    };
    std::fs::write(&config, text).unwrap();
    config
}

#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "in vain waited for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An object as it lies in the spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spooled {
    pub sequence: u64,
    pub calling_ae: String,
    pub sop_class: String,
    pub sop_instance: String,
    pub transfer_syntax: String,
    pub file: Vec<u8>,
}

/// Reads the spool's files as `intake/spool/record.rs` describes them, by itself.
pub fn spooled(folder: &Path) -> Vec<Spooled> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder.join("state/spool")).unwrap() {
        // A running node may just have removed it.
        let Ok(bytes) = std::fs::read(entry.unwrap().path()) else {
            continue;
        };
        let mut at = 0;
        while at + 512 <= bytes.len() {
            let block = &bytes[at..at + 512];
            if !block.starts_with(b"PESPOOL1") {
                at += 4096;
                continue;
            }
            let u64_at = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().unwrap());
            let length = usize::try_from(u64_at(24)).unwrap();
            let mut texts = Vec::new();
            let mut text_at = 40;
            for _ in 0..5 {
                let length = usize::from(block[text_at]);
                let text = &block[text_at + 1..text_at + 1 + length];
                texts.push(String::from_utf8(text.to_vec()).unwrap());
                text_at += 1 + length;
            }
            found.push(Spooled {
                sequence: u64_at(8),
                calling_ae: texts[0].clone(),
                sop_class: texts[2].clone(),
                sop_instance: texts[3].clone(),
                transfer_syntax: texts[4].clone(),
                file: bytes[at + 512..at + 512 + length].to_vec(),
            });
            at += (512 + length).next_multiple_of(4096);
        }
    }
    found.sort_by_key(|object| object.sequence);
    found
}

/// A client association.
pub struct Client {
    pub stream: TcpStream,
    pub answer: AssociationAC,
    pub max_pdu: usize,
    next_message: u16,
}

/// A context that is proposed: class and transfer syntaxes; identifiers are 1, 3, 5 ...
pub type Proposed<'a> = (&'a str, &'a [&'a str]);

impl Client {
    /// Opens as `TESTER`, calling `PEEDGE`.
    pub fn open(address: SocketAddr, contexts: &[Proposed<'_>]) -> Result<Self, AssociationRJ> {
        Self::open_as(address, "TESTER", "PEEDGE", contexts)
    }

    pub fn open_as(
        address: SocketAddr,
        calling: &str,
        called: &str,
        contexts: &[Proposed<'_>],
    ) -> Result<Self, AssociationRJ> {
        Self::attempt(address, calling, called, contexts).unwrap()
    }

    /// Opens where the node still lives: `None` where it was killed before it answered.
    pub fn open_if_there(address: SocketAddr, contexts: &[Proposed<'_>]) -> Option<Self> {
        let attempt = Self::attempt(address, "TESTER", "PEEDGE", contexts);
        attempt.ok().map(Result::unwrap)
    }

    fn attempt(
        address: SocketAddr,
        calling: &str,
        called: &str,
        contexts: &[Proposed<'_>],
    ) -> io::Result<Result<Self, AssociationRJ>> {
        let mut stream = try_connect(address)?;
        stream.write_all(&encode(&request(calling, called, contexts)))?;
        match receive(&mut stream)? {
            Some(Pdu::AssociationAC(answer)) => Ok(Ok(Self {
                stream,
                answer,
                max_pdu: 16_384,
                next_message: 1,
            })),
            Some(Pdu::AssociationRJ(rejection)) => Ok(Err(rejection)),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
            other => panic!("{other:?}"),
        }
    }

    /// Sends a C-STORE and waits for its status.
    pub fn store(
        &mut self,
        context: u8,
        class: &str,
        instance: &str,
        data_set: &[u8],
    ) -> io::Result<u16> {
        self.store_command(context, class, instance)?;
        self.data(context, data_set)?;
        self.status()
    }

    pub fn store_command(&mut self, context: u8, class: &str, instance: &str) -> io::Result<()> {
        let command = command(&[
            (0x0002, uid(class)),
            (0x0100, 0x0001_u16.to_le_bytes().to_vec()),
            (0x0110, self.message().to_le_bytes().to_vec()),
            (0x0700, 0_u16.to_le_bytes().to_vec()),
            (0x0800, 1_u16.to_le_bytes().to_vec()),
            (0x1000, uid(instance)),
        ]);
        self.stream
            .write_all(&value(context, PDataValueType::Command, true, &command))
    }

    pub fn data(&mut self, context: u8, data_set: &[u8]) -> io::Result<()> {
        let most = self.max_pdu - 6;
        let n_chunks = data_set.len().div_ceil(most).max(1);
        for index in 0..n_chunks {
            let chunk = &data_set[index * most..data_set.len().min((index + 1) * most)];
            let is_last = index + 1 == n_chunks;
            self.stream
                .write_all(&value(context, PDataValueType::Data, is_last, chunk))?;
        }
        Ok(())
    }

    pub fn echo(&mut self, context: u8) -> io::Result<u16> {
        let command = command(&[
            (0x0002, uid(ECHO)),
            (0x0100, 0x0030_u16.to_le_bytes().to_vec()),
            (0x0110, self.message().to_le_bytes().to_vec()),
            (0x0800, 0x0101_u16.to_le_bytes().to_vec()),
        ]);
        self.stream
            .write_all(&value(context, PDataValueType::Command, true, &command))?;
        self.status()
    }

    /// The status of the next response.
    pub fn status(&mut self) -> io::Result<u16> {
        match receive(&mut self.stream)? {
            Some(Pdu::PData { data }) => {
                let elements = elements(&data[0].data);
                let status = elements.get(&0x0900).expect("a status");
                Ok(u16::from_le_bytes(status.as_slice().try_into().unwrap()))
            }
            Some(Pdu::AbortRQ { source }) => Err(io::Error::other(format!("aborted: {source:?}"))),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
            other => panic!("{other:?}"),
        }
    }

    pub fn release(mut self) {
        self.stream.write_all(&encode(&Pdu::ReleaseRQ)).unwrap();
        assert_eq!(receive(&mut self.stream).unwrap(), Some(Pdu::ReleaseRP));
        assert_eq!(receive(&mut self.stream).unwrap(), None);
    }

    fn message(&mut self) -> u16 {
        self.next_message += 1;
        self.next_message - 1
    }
}

pub fn connect(address: SocketAddr) -> TcpStream {
    try_connect(address).unwrap()
}

fn try_connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

pub fn request(calling: &str, called: &str, contexts: &[Proposed<'_>]) -> Pdu {
    let contexts = contexts.iter().zip((1..=u8::MAX).step_by(2));
    let contexts = contexts.map(|((class, syntaxes), id)| PresentationContextProposed {
        id,
        abstract_syntax: (*class).to_owned(),
        transfer_syntaxes: syntaxes.iter().map(|syntax| (*syntax).to_owned()).collect(),
    });
    Pdu::AssociationRQ(AssociationRQ {
        protocol_version: 1,
        calling_ae_title: calling.to_owned(),
        called_ae_title: called.to_owned(),
        application_context_name: "1.2.840.10008.3.1.1.1".to_owned(),
        presentation_contexts: contexts.collect(),
        user_variables: vec![
            UserVariableItem::MaxLength(16_384),
            UserVariableItem::ImplementationClassUID("1.2.3.4".to_owned()),
        ],
    })
}

/// Reads a PDU; `None` at the end of the connection, a reset included.
pub fn receive(stream: &mut impl Read) -> io::Result<Option<Pdu>> {
    let mut head = [0; 6];
    match stream.read_exact(&mut head) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            ) =>
        {
            return Ok(None);
        }
        read => read?,
    }
    let length = u32::from_be_bytes(head[2..6].try_into().unwrap());
    let mut whole = head.to_vec();
    whole.resize(6 + length as usize, 0);
    stream.read_exact(&mut whole[6..])?;
    Ok(read_pdu(whole.as_slice(), 1 << 20, false).unwrap())
}

pub fn encode(pdu: &Pdu) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_pdu(&mut bytes, pdu).unwrap();
    bytes
}

/// A P-DATA-TF with one value.
pub fn value(context: u8, kind: PDataValueType, is_last: bool, data: &[u8]) -> Vec<u8> {
    encode(&Pdu::PData {
        data: vec![PDataValue {
            presentation_context_id: context,
            value_type: kind,
            is_last,
            data: data.to_vec(),
        }],
    })
}

pub fn uid(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(bytes.len().next_multiple_of(2), 0);
    bytes
}

/// A command set.
pub fn command(elements: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (element, value) in elements {
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&element.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(value.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(value);
    }
    bytes
}

pub fn elements(command: &[u8]) -> BTreeMap<u16, Vec<u8>> {
    let mut elements = BTreeMap::new();
    let mut rest = command;
    while let Some((head, tail)) = rest.split_first_chunk::<8>() {
        let length = u32::from_le_bytes(head[4..8].try_into().unwrap()) as usize;
        let element = u16::from_le_bytes([head[2], head[3]]);
        elements.insert(element, tail[..length].to_vec());
        rest = &tail[length..];
    }
    elements
}

/// A data set in Explicit VR Little Endian that names class and instance and has so many bytes of pixel data.
pub fn data_set(class: &str, instance: &str, pixel_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (element, text) in [(0x16_u16, class), (0x18, instance)] {
        let value = uid(text);
        bytes.extend_from_slice(&[8, 0]);
        bytes.extend_from_slice(&element.to_le_bytes());
        bytes.extend_from_slice(b"UI");
        bytes.extend_from_slice(&u16::try_from(value.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&value);
    }
    bytes.extend_from_slice(&[0xe0, 0x7f, 0x10, 0, b'O', b'W', 0, 0]);
    bytes.extend_from_slice(&u32::try_from(pixel_bytes).unwrap().to_le_bytes());
    let pixels = (0..pixel_bytes).map(|index| (index * 7 + index / 251) as u8);
    bytes.extend(pixels);
    bytes
}
