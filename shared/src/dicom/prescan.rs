//! The bounded pre-scan: one pass over a data set's element headers before any other code reads it.
//!
//! In: the bytes of a data set and its encoding. Out: where the elements lie that the gate needs, where each frame's functional
//! groups lie, and where the pixel data's bytes or fragments lie. Nothing is copied, no value is interpreted, no recursion takes
//! place; memory is at most the named bounds below. PS3.5 sections 7.1 (elements), 7.5 (sequences), A.4 (fragments).
//!
//! Private elements, patient data and everything else that no row of the gate asks for are stepped over. What the values mean is
//! left to `attributes`.

use super::ReadError;
use super::source::{Data, Window};
use super::transfer_syntax::Encoding;
use dicom_core::Tag;
use std::borrow::Cow;
use std::ops::Range;

/// Deepest nesting of sequences that is followed; Enhanced CT needs 4.
pub const MAX_DEPTH: usize = 32;
/// Most element and item headers in one data set; an Enhanced CT of 2,000 frames has about 150,000.
pub const MAX_ELEMENTS: usize = 2_000_000;
/// Most frames in one object.
pub const MAX_FRAMES: usize = 16_384;
/// Most fragments of encapsulated pixel data.
pub const MAX_FRAGMENTS: usize = 65_536;
/// Longest value of an element that is interpreted; the longest such value by the standard is Image Type, far below.
pub const MAX_VALUE_BYTES: usize = 1_024;
/// Largest object that is looked at.
pub const MAX_OBJECT_BYTES: usize = 1 << 30;

/// "Undefined length" (PS3.5 section 7.1.1).
const UNDEFINED: u32 = u32::MAX;

const ITEM: Tag = Tag(0xFFFE, 0xE000);
const ITEM_DELIMITATION: Tag = Tag(0xFFFE, 0xE00D);
const SEQUENCE_DELIMITATION: Tag = Tag(0xFFFE, 0xE0DD);
const PIXEL_DATA: Tag = Tag(0x7FE0, 0x0010);
const MODALITY_LUT_SEQUENCE: Tag = Tag(0x0028, 0x3000);
const SHARED_GROUPS: Tag = Tag(0x5200, 0x9229);
const PER_FRAME_GROUPS: Tag = Tag(0x5200, 0x9230);

/// An element's header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    /// The tag.
    pub(super) tag: Tag,
    /// The VR, `None` in Implicit VR.
    vr: Option<[u8; 2]>,
    /// The length as written, possibly [`UNDEFINED`].
    length: u32,
    /// Where the element begins.
    start: usize,
}

impl Header {
    /// Whether the element is a sequence, as far as its header says so.
    fn is_sequence(&self) -> bool {
        match self.vr {
            Some(vr) => vr == *b"SQ" || (vr == *b"UN" && self.length == UNDEFINED),
            None => self.length == UNDEFINED,
        }
    }
}

/// An element whose value is interpreted later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    /// The tag.
    pub(super) tag: Tag,
    /// Where its value lies.
    pub(super) value: Range<usize>,
}

/// Where Pixel Data (7FE0,0010) lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PixelData {
    /// One run of bytes for all frames.
    Native {
        /// The value.
        value: Range<usize>,
        /// Whether the VR is OW: in big endian, 8-bit values are swapped in pairs.
        is_word: bool,
    },
    /// Fragments (PS3.5 section A.4).
    Encapsulated {
        /// The Basic Offset Table's value, possibly empty.
        offset_table: Range<usize>,
        /// The fragments' values, in order.
        fragments: Vec<Range<usize>>,
    },
}

/// What the pre-scan found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Elements of the data set itself.
    pub(super) elements: Vec<Element>,
    /// Elements that are copied into results.
    pub(super) copied: Vec<Element>,
    /// Elements of the shared functional groups.
    pub(super) shared: Vec<Element>,
    /// Elements of each frame's functional groups.
    pub(super) per_frame: Vec<Vec<Element>>,
    /// Pixel data, the first of the data set itself.
    pub(super) pixel_data: Option<PixelData>,
    /// Whether a Modality LUT Sequence with at least one byte is present, at any place that concerns pixels.
    pub(super) has_modality_lut: bool,
}

/// Whether the two bytes are a VR of PS3.5 table 6.2-1.
pub(super) fn is_known_vr(vr: [u8; 2]) -> bool {
    is_short_vr(vr) || LONG_VRS.contains(&&vr)
}

/// VRs with a 32-bit length (PS3.5 section 7.1.2).
const LONG_VRS: [&[u8; 2]; 13] = [
    b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV",
];
/// VRs with a 16-bit length (PS3.5 section 7.1.2).
const SHORT_VRS: [&[u8; 2]; 21] = [
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN",
    b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US",
];

fn is_short_vr(vr: [u8; 2]) -> bool {
    SHORT_VRS.contains(&&vr)
}

/// A position in the bytes that only moves forward and never past the end.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    data: &'a Data<'a>,
    window: Window,
    position: usize,
    encoding: Encoding,
}

impl<'a> Cursor<'a> {
    /// A cursor at `position`.
    pub(super) fn new(data: &'a Data<'a>, position: usize, encoding: Encoding) -> Self {
        Self {
            data,
            window: Window::default(),
            position,
            encoding,
        }
    }

    /// Offset of the next byte.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// The next element's group, without moving.
    pub(super) fn peek_group(&mut self) -> Option<u16> {
        let group = self.window.array::<2>(self.data, self.position)?;
        Some(self.encoding.u16(group))
    }

    /// Reads an element's or item's header.
    ///
    /// # Errors
    ///
    /// [`ReadError::Truncated`] where the header breaks off, [`ReadError::Vr`] where the VR is not two capital letters.
    pub(super) fn header(&mut self) -> Result<Header, ReadError> {
        let start = self.position;
        let [g0, g1, e0, e1] = self.take()?;
        let tag = Tag(self.encoding.u16([g0, g1]), self.encoding.u16([e0, e1]));
        // Items and delimiters have no VR in any encoding (PS3.5 section 7.5).
        if !self.encoding.is_explicit() || tag.0 == ITEM.0 {
            let length = self.take()?;
            return Ok(Header {
                tag,
                vr: None,
                length: self.encoding.u32(length),
                start,
            });
        }
        let vr = self.take::<2>()?;
        let length = if is_short_vr(vr) {
            let length = self.take()?;
            u32::from(self.encoding.u16(length))
        } else if vr.iter().all(u8::is_ascii_uppercase) {
            // Also VRs that are not known: all VRs added since 1993 have a 32-bit length.
            let [_, _, l0, l1, l2, l3] = self.take()?;
            self.encoding.u32([l0, l1, l2, l3])
        } else {
            return Err(ReadError::Vr { tag, found: vr });
        };
        Ok(Header {
            tag,
            vr: Some(vr),
            length,
            start,
        })
    }

    /// The value that follows `header`, which must have a defined length.
    ///
    /// # Errors
    ///
    /// [`ReadError::Length`] where the value claims more than the bytes left.
    pub(super) fn value(&mut self, header: &Header) -> Result<Cow<'a, [u8]>, ReadError> {
        let range = self.value_range(header, self.data.len())?;
        let offset = range.start;
        self.data.get(range).ok_or(ReadError::Truncated { offset })
    }

    /// The range of the value that follows `header` and must end at or before `limit`; moves behind it.
    fn value_range(&mut self, header: &Header, limit: usize) -> Result<Range<usize>, ReadError> {
        let left = limit.saturating_sub(self.position);
        let length = header.length as usize;
        if header.length == UNDEFINED || length > left {
            return Err(ReadError::Length {
                tag: header.tag,
                found: header.length,
                left,
            });
        }
        let start = self.position;
        self.position += length;
        Ok(start..self.position)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        let offset = self.position;
        let chunk = self
            .window
            .array(self.data, offset)
            .ok_or(ReadError::Truncated { offset })?;
        self.position += N;
        Ok(chunk)
    }
}

/// Which elements a level of nesting yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The data set itself.
    Root,
    /// Items of the Shared Functional Groups Sequence.
    Shared,
    /// Items of the Per-Frame Functional Groups Sequence.
    PerFrame,
    /// Items of one functional group's sequence (its tag) inside shared groups.
    SharedMacro(Tag),
    /// Items of one functional group's sequence inside a frame's groups.
    FrameMacro(Tag),
    /// Nothing in it is of interest.
    Skipped,
}

/// An open sequence or item.
#[derive(Debug, Clone, Copy)]
struct Level {
    /// Where it must end; the enclosing level's limit where its own length is undefined.
    limit: usize,
    /// Whether a delimiter ends it.
    is_undefined: bool,
    /// Whether it is a sequence (holding items) or an item (holding elements).
    is_sequence: bool,
    role: Role,
    /// Implicit inside a UN of undefined length (PS3.5 section 6.2.2 note 2).
    encoding: Encoding,
}

/// Scans the data set that begins at `start`.
///
/// # Errors
///
/// Any [`ReadError`] but those of the container: each names the tag and the bound that was broken.
pub(super) fn scan(data: &Data<'_>, start: usize, encoding: Encoding) -> Result<Scan, ReadError> {
    let (scan, done) = scan_as_far_as_possible(data, start, encoding);
    done.map(|()| scan)
}

/// As [`scan`], with what was found before an error.
pub(super) fn scan_as_far_as_possible(
    data: &Data<'_>,
    start: usize,
    encoding: Encoding,
) -> (Scan, Result<(), ReadError>) {
    let mut scanner = Scanner {
        cursor: Cursor::new(data, start, encoding),
        levels: Vec::new(),
        n_elements: 0,
        scan: Scan::default(),
    };
    scanner.levels.push(Level {
        limit: data.len(),
        is_undefined: false,
        is_sequence: false,
        role: Role::Root,
        encoding,
    });
    let done = scanner.run();
    (scanner.scan, done)
}

#[derive(Debug)]
struct Scanner<'a> {
    cursor: Cursor<'a>,
    levels: Vec<Level>,
    n_elements: usize,
    scan: Scan,
}

impl Scanner<'_> {
    fn run(&mut self) -> Result<(), ReadError> {
        while let Some(level) = self.levels.last().copied() {
            if self.cursor.position >= level.limit {
                if level.is_undefined {
                    return Err(ReadError::Truncated {
                        offset: self.cursor.position,
                    });
                }
                self.levels.pop();
                continue;
            }
            // The rest of the file after its pixel data holds padding and signatures; it is not needed and often not well formed.
            if level.role == Role::Root && self.scan.pixel_data.is_some() {
                break;
            }
            self.step(level)?;
        }
        Ok(())
    }

    /// Reads one header inside `level` and what belongs to it.
    fn step(&mut self, level: Level) -> Result<(), ReadError> {
        self.n_elements += 1;
        if self.n_elements > MAX_ELEMENTS {
            return Err(ReadError::TooMany {
                what: "data elements",
                allowed: MAX_ELEMENTS,
            });
        }
        self.cursor.encoding = level.encoding;
        let header = self.cursor.header()?;
        if self.cursor.position > level.limit {
            return Err(ReadError::Truncated {
                offset: header.start,
            });
        }
        if level.is_sequence {
            self.inside_sequence(level, &header)
        } else {
            self.inside_item(level, &header)
        }
    }

    /// An item, or the end of the sequence.
    fn inside_sequence(&mut self, level: Level, header: &Header) -> Result<(), ReadError> {
        match header.tag {
            SEQUENCE_DELIMITATION if level.is_undefined => {
                self.levels.pop();
                Ok(())
            }
            ITEM => {
                let role = match level.role {
                    Role::PerFrame => {
                        if self.scan.per_frame.len() >= MAX_FRAMES {
                            return Err(ReadError::TooMany {
                                what: "frames",
                                allowed: MAX_FRAMES,
                            });
                        }
                        self.scan.per_frame.push(Vec::new());
                        Role::PerFrame
                    }
                    role => role,
                };
                self.open(level, header, false, role, level.encoding)
            }
            tag => Err(ReadError::Delimiter { tag }),
        }
    }

    /// An element, or the end of the item.
    fn inside_item(&mut self, level: Level, header: &Header) -> Result<(), ReadError> {
        if header.tag.0 == ITEM.0 {
            // Some writers end a sequence or item of defined length with a delimiter as well; it is then superfluous.
            let is_superfluous = matches!(header.tag, ITEM_DELIMITATION | SEQUENCE_DELIMITATION)
                && header.length == 0;
            if header.tag == ITEM_DELIMITATION && level.is_undefined {
                self.levels.pop();
                return Ok(());
            }
            return if is_superfluous {
                Ok(())
            } else {
                Err(ReadError::Delimiter { tag: header.tag })
            };
        }
        if header.tag == PIXEL_DATA {
            return self.pixel_data(level, header);
        }
        if header.tag == MODALITY_LUT_SEQUENCE && level.role != Role::Skipped && header.length != 0
        {
            self.scan.has_modality_lut = true;
        }
        let role = nested_role(level.role, header.tag);
        // A sequence of defined length is stepped over as a whole unless something in it is wanted.
        if header.is_sequence() && header.length == UNDEFINED
            || role != Role::Skipped && header.length > 0
        {
            let encoding = match header.vr {
                Some(vr) if vr == *b"UN" => Encoding::ImplicitLittle,
                _ => level.encoding,
            };
            return self.open(level, header, true, role, encoding);
        }
        let value = self.cursor.value_range(header, level.limit)?;
        self.keep(level.role, header.tag, value)
    }

    /// Opens a sequence or an item.
    fn open(
        &mut self,
        level: Level,
        header: &Header,
        is_sequence: bool,
        role: Role,
        encoding: Encoding,
    ) -> Result<(), ReadError> {
        // Two levels (sequence and item) a nesting, and the root.
        if self.levels.len() > 2 * MAX_DEPTH {
            return Err(ReadError::Depth {
                tag: header.tag,
                allowed: MAX_DEPTH,
            });
        }
        let is_undefined = header.length == UNDEFINED;
        let left = level.limit - self.cursor.position;
        if !is_undefined && header.length as usize > left {
            return Err(ReadError::Length {
                tag: header.tag,
                found: header.length,
                left,
            });
        }
        self.levels.push(Level {
            limit: if is_undefined {
                level.limit
            } else {
                self.cursor.position + header.length as usize
            },
            is_undefined,
            is_sequence,
            role,
            encoding,
        });
        Ok(())
    }

    /// Remembers an element that the gate asks for.
    fn keep(&mut self, role: Role, tag: Tag, value: Range<usize>) -> Result<(), ReadError> {
        let is_copied = role == Role::Root && super::copied::is_copied(tag);
        if is_copied && value.len() > MAX_VALUE_BYTES {
            return Ok(());
        }
        let elements = match role {
            Role::Root if is_copied => &mut self.scan.copied,
            Role::Root if super::attributes::is_wanted(tag) => &mut self.scan.elements,
            Role::SharedMacro(group) if super::functional_groups::is_wanted(group, tag) => {
                &mut self.scan.shared
            }
            Role::FrameMacro(group) if super::functional_groups::is_wanted(group, tag) => {
                match self.scan.per_frame.last_mut() {
                    Some(elements) => elements,
                    None => return Ok(()),
                }
            }
            _ => return Ok(()),
        };
        if value.len() > MAX_VALUE_BYTES {
            return Err(ReadError::ValueLength {
                tag,
                found: value.len(),
                allowed: MAX_VALUE_BYTES,
            });
        }
        if elements.iter().any(|element| element.tag == tag) {
            return Err(ReadError::Duplicate { tag });
        }
        elements.push(Element { tag, value });
        Ok(())
    }

    /// Pixel Data: of the data set itself, or of an icon, which is stepped over.
    fn pixel_data(&mut self, level: Level, header: &Header) -> Result<(), ReadError> {
        let is_root = level.role == Role::Root;
        let pixel_data = if header.length == UNDEFINED {
            let (offset_table, fragments) = self.fragments(level)?;
            PixelData::Encapsulated {
                offset_table,
                fragments,
            }
        } else {
            PixelData::Native {
                value: self.cursor.value_range(header, level.limit)?,
                is_word: header.vr != Some(*b"OB"),
            }
        };
        if is_root {
            self.scan.pixel_data = Some(pixel_data);
        }
        Ok(())
    }

    /// The Basic Offset Table and the fragments, up to the sequence delimiter.
    fn fragments(&mut self, level: Level) -> Result<(Range<usize>, Vec<Range<usize>>), ReadError> {
        let mut offset_table = None;
        let mut fragments = Vec::new();
        loop {
            let header = self.cursor.header()?;
            match header.tag {
                ITEM => {
                    let value = self.cursor.value_range(&header, level.limit)?;
                    if offset_table.is_none() {
                        offset_table = Some(value);
                    } else if fragments.len() < MAX_FRAGMENTS {
                        fragments.push(value);
                    } else {
                        return Err(ReadError::TooMany {
                            what: "fragments of pixel data",
                            allowed: MAX_FRAGMENTS,
                        });
                    }
                }
                SEQUENCE_DELIMITATION => {
                    let offset_table = offset_table.unwrap_or(header.start..header.start);
                    return Ok((offset_table, fragments));
                }
                tag => return Err(ReadError::Delimiter { tag }),
            }
        }
    }
}

/// What the items of the sequence `tag` are to the scan.
fn nested_role(role: Role, tag: Tag) -> Role {
    match (role, tag) {
        (Role::Root, SHARED_GROUPS) => Role::Shared,
        (Role::Root, PER_FRAME_GROUPS) => Role::PerFrame,
        (Role::Shared, tag) if super::functional_groups::is_group(tag) => Role::SharedMacro(tag),
        (Role::PerFrame, tag) if super::functional_groups::is_group(tag) => Role::FrameMacro(tag),
        _ => Role::Skipped,
    }
}
