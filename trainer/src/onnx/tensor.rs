//! Constants: constructors for those that we emit, and checked readers.

use super::{DataType, OnnxError, TensorProto, extent_i64};

impl TensorProto {
    /// A float constant; an empty shape is a scalar.
    #[must_use]
    pub fn float(name: &str, dims: &[usize], values: &[f32]) -> Self {
        let raw = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        Self::raw(name, DataType::Float, dims, raw)
    }

    /// An i8 constant.
    #[must_use]
    pub fn int8(name: &str, dims: &[usize], values: &[i8]) -> Self {
        let raw = values.iter().map(|&value| value.cast_unsigned()).collect();
        Self::raw(name, DataType::Int8, dims, raw)
    }

    /// A u8 constant.
    #[must_use]
    pub fn uint8(name: &str, dims: &[usize], values: &[u8]) -> Self {
        Self::raw(name, DataType::Uint8, dims, values.to_vec())
    }

    /// An i32 constant.
    #[must_use]
    pub fn int32(name: &str, dims: &[usize], values: &[i32]) -> Self {
        let raw = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        Self::raw(name, DataType::Int32, dims, raw)
    }

    /// A constant from its little-endian bytes.
    #[must_use]
    pub fn raw(name: &str, element: DataType, dims: &[usize], raw_data: Vec<u8>) -> Self {
        Self {
            dims: dims.iter().map(|&extent| extent_i64(extent)).collect(),
            data_type: element as i32,
            name: name.to_owned(),
            raw_data,
            ..Self::default()
        }
    }

    /// Shape, outermost first.
    ///
    /// # Errors
    ///
    /// [`OnnxError::RawData`] for a negative extent or a product beyond the address space.
    pub fn shape(&self) -> Result<Vec<usize>, OnnxError> {
        let shape: Option<Vec<usize>> = self
            .dims
            .iter()
            .map(|&extent| usize::try_from(extent).ok())
            .collect();
        let shape = shape.filter(|shape| {
            shape
                .iter()
                .try_fold(1_usize, |product, &extent| product.checked_mul(extent))
                .is_some()
        });
        shape.ok_or_else(|| self.bad_raw_data(0))
    }

    /// Values of a float constant.
    ///
    /// # Errors
    ///
    /// [`OnnxError::ElementType`] or [`OnnxError::RawData`].
    pub fn to_f32(&self) -> Result<Vec<f32>, OnnxError> {
        let raw = self.checked(DataType::Float, 4)?;
        Ok(raw
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect())
    }

    /// Values of an i8 constant.
    ///
    /// # Errors
    ///
    /// [`OnnxError::ElementType`] or [`OnnxError::RawData`].
    pub fn to_i8(&self) -> Result<Vec<i8>, OnnxError> {
        let raw = self.checked(DataType::Int8, 1)?;
        Ok(raw.iter().map(|&byte| byte.cast_signed()).collect())
    }

    /// Values of a u8 constant.
    ///
    /// # Errors
    ///
    /// [`OnnxError::ElementType`] or [`OnnxError::RawData`].
    pub fn to_u8(&self) -> Result<Vec<u8>, OnnxError> {
        Ok(self.checked(DataType::Uint8, 1)?.to_vec())
    }

    /// Values of an i32 constant.
    ///
    /// # Errors
    ///
    /// [`OnnxError::ElementType`] or [`OnnxError::RawData`].
    pub fn to_i32(&self) -> Result<Vec<i32>, OnnxError> {
        let raw = self.checked(DataType::Int32, 4)?;
        Ok(raw
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| i32::from_le_bytes(bytes))
            .collect())
    }

    fn checked(&self, expected: DataType, element_bytes: usize) -> Result<&[u8], OnnxError> {
        if self.data_type != expected as i32 {
            return Err(OnnxError::ElementType {
                name: self.name.clone(),
                found: self.data_type,
                expected,
            });
        }
        let n_values: usize = self.shape()?.iter().product();
        let bytes = n_values.saturating_mul(element_bytes);
        if self.raw_data.len() != bytes || self.data_location != 0 {
            return Err(self.bad_raw_data(bytes));
        }
        Ok(&self.raw_data)
    }

    fn bad_raw_data(&self, expected: usize) -> OnnxError {
        OnnxError::RawData {
            name: self.name.clone(),
            dims: self.dims.clone(),
            found: self.raw_data.len(),
            expected,
        }
    }
}
