//! A DICOM unique identifier, checked once and bounded (PS3.5 section 9.1).

use core::fmt;

use serde::{Deserialize, Serialize};

/// Longest UID that DICOM allows, in characters (PS3.5 section 9.1).
pub const MAX_UID_LENGTH: usize = 64;

/// A UID: 1 to 64 characters out of `0-9` and `.`, no empty component.
///
/// Leading zeros in a component break PS3.5 but are met in the field; they are accepted, because refusing them would
/// leave a slice unanalysed for a blemish that changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(
    try_from = "heapless::String<MAX_UID_LENGTH>",
    into = "heapless::String<MAX_UID_LENGTH>"
)]
pub struct Uid(heapless::String<MAX_UID_LENGTH>);

/// Why a text is not a UID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UidError {
    /// Nothing but padding.
    #[error("a UID is empty")]
    Empty,
    /// Longer than [`MAX_UID_LENGTH`].
    #[error("a UID has {length} characters; at most {MAX_UID_LENGTH} are allowed")]
    TooLong {
        /// Characters found.
        length: usize,
    },
    /// A character other than a digit or a full stop.
    #[error(
        "a UID holds the character {found:?} at position {position}; only 0-9 and '.' are allowed"
    )]
    Character {
        /// The character.
        found: char,
        /// Where it stands, counted from 0.
        position: usize,
    },
    /// Two full stops in a row, or one at an end.
    #[error("a UID has an empty component")]
    EmptyComponent,
}

impl Uid {
    /// Checks `text`; trailing NUL and space padding is taken off first.
    ///
    /// # Errors
    /// [`UidError`] says what is wrong, never the text itself.
    pub fn new(text: &str) -> Result<Self, UidError> {
        let text = text.trim_end_matches(['\0', ' ']);
        if text.is_empty() {
            return Err(UidError::Empty);
        }
        if let Some((position, found)) = text
            .char_indices()
            .find(|(_, c)| !c.is_ascii_digit() && *c != '.')
        {
            return Err(UidError::Character { found, position });
        }
        if text.split('.').any(str::is_empty) {
            return Err(UidError::EmptyComponent);
        }
        heapless::String::try_from(text)
            .map(Self)
            .map_err(|_| UidError::TooLong { length: text.len() })
    }

    /// The UID as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<heapless::String<MAX_UID_LENGTH>> for Uid {
    type Error = UidError;

    fn try_from(text: heapless::String<MAX_UID_LENGTH>) -> Result<Self, UidError> {
        Self::new(&text)
    }
}

impl From<Uid> for heapless::String<MAX_UID_LENGTH> {
    fn from(uid: Uid) -> Self {
        uid.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uid_keeps_its_text_without_padding() {
        assert_eq!(
            Uid::new("1.2.840.10008\0").unwrap().as_str(),
            "1.2.840.10008"
        );
    }

    #[test]
    fn json_is_checked_like_text() {
        let uid: Uid = serde_json::from_str("\"1.2.3\"").unwrap();
        assert_eq!(serde_json::to_string(&uid).unwrap(), "\"1.2.3\"");
        assert!(serde_json::from_str::<Uid>("\"1.2.x\"").is_err());
    }

    #[test]
    fn malformed_uids_are_refused_with_the_reason() {
        assert_eq!(Uid::new(" \0"), Err(UidError::Empty));
        assert_eq!(Uid::new("1..2"), Err(UidError::EmptyComponent));
        assert_eq!(
            Uid::new("1.2/../3"),
            Err(UidError::Character {
                found: '/',
                position: 3
            })
        );
        assert_eq!(
            Uid::new(&"1".repeat(65)),
            Err(UidError::TooLong { length: 65 })
        );
    }
}
