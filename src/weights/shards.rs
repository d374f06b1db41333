//! Safetensors files, written tensor by tensor: names, types and shapes are known first, so the header comes first and
//! each tensor has its place; the values follow in any order, one at a time, and are never all in memory.
//!
//! The layout is the safetensors crate's: eight bytes of header length, a JSON header padded to eight bytes, tensors
//! without gaps, those of wider types first and then by name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::StoredType;
use super::write::{replace_file, write_atomic};
use crate::error::{Context, Error, Result};

/// The size that a shard is kept under unless another is asked for.
pub const DEFAULT_SHARD_BYTES: usize = 5_000_000_000;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// The type of its values in the file.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// What `tensor` is stored as under `name`.
    pub fn of(name: &str, tensor: &Tensor) -> Result<Self> {
        let dtype = safetensors_dtype(tensor.dtype())
            .ok_or_else(|| Error::invalid(format!("{} cannot be stored", tensor.dtype().as_str())))
            .in_tensor(name)?;
        Ok(Self { name: name.to_string(), dtype, shape: tensor.dims().to_vec() })
    }

    fn size_in_bytes(&self) -> Result<usize> {
        let bits = self.shape.iter().try_fold(self.dtype.bitsize(), |bits, n| bits.checked_mul(*n));
        match bits {
            Some(bits) if bits % 8 == 0 => Ok(bits / 8),
            _ => Err(Error::invalid(format!("shape {:?} cannot be stored as {}", self.shape, self.dtype)))
                .in_tensor(&self.name),
        }
    }
}

/// Writes the weights of a model: `model.safetensors`, or shards and their index where they are too large for one file.
#[derive(Debug)]
pub struct ShardedWriter {
    folder: PathBuf,
    files: Vec<(PathBuf, File)>,
    places: BTreeMap<String, Place>,
    total: usize,
}

#[derive(Debug)]
struct Place {
    file: usize,
    start: usize,
    bytes: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    written: bool,
}

impl ShardedWriter {
    /// Makes the files in an existing folder. Shards are cut in the order of `tensors`; a tensor is never cut.
    pub fn create(
        folder: &Path,
        tensors: &[TensorSpec],
        metadata: &BTreeMap<String, String>,
        max_shard_bytes: usize,
    ) -> Result<Self> {
        let mut shards: Vec<Vec<&TensorSpec>> = vec![Vec::new()];
        let (mut total, mut filled) = (0, 0);
        for tensor in tensors {
            let bytes = tensor.size_in_bytes()?;
            if filled > 0 && filled + bytes > max_shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            // There is a last shard: one is made above the loop.
            if let Some(shard) = shards.last_mut() {
                shard.push(tensor);
            }
            filled += bytes;
            total += bytes;
        }
        let count = shards.len();
        let mut writer =
            Self { folder: folder.to_path_buf(), files: Vec::new(), places: BTreeMap::new(), total };
        for (index, shard) in shards.iter().enumerate() {
            let name = match count {
                1 => "model.safetensors".to_string(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            let path = folder.join(name);
            let layout = Layout::new(shard, metadata)?;
            let mut file = File::create(&path).at(&path)?;
            file.write_all(&layout.header).and_then(|()| file.set_len(layout.end as u64)).at(&path)?;
            writer.files.push((path, file));
            for (spec, start, bytes) in layout.places {
                let place = Place {
                    file: index,
                    start,
                    bytes,
                    dtype: spec.dtype,
                    shape: spec.shape.clone(),
                    written: false,
                };
                if writer.places.insert(spec.name.clone(), place).is_some() {
                    return Err(Error::invalid("is to be written twice")).in_tensor(&spec.name);
                }
            }
        }
        Ok(writer)
    }

    /// Writes the values of a tensor, which must have the type and shape that were announced.
    pub fn write(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let (path, file, place) = self.seek(name)?;
        if Some(place.dtype) != safetensors_dtype(tensor.dtype()) || place.shape != tensor.dims() {
            return Err(Error::invalid(format!(
                "announced as {} {:?}, found {} {:?}",
                StoredType::from(place.dtype),
                place.shape,
                tensor.dtype().as_str(),
                tensor.dims()
            )))
            .in_tensor(name);
        }
        write_values(file, tensor).at(path)?;
        place.written = true;
        Ok(())
    }

    /// Writes the bytes of a tensor as another file has them.
    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (path, file, place) = self.seek(name)?;
        if place.bytes != bytes.len() {
            return Err(Error::invalid(format!("expected {} bytes, found {}", place.bytes, bytes.len())))
                .in_tensor(name);
        }
        file.write_all(bytes).at(path)?;
        place.written = true;
        Ok(())
    }

    /// Checks that nothing was left out, syncs, and writes the index where there are shards.
    pub fn finish(self) -> Result<()> {
        if let Some((name, _)) = self.places.iter().find(|(_, place)| !place.written) {
            return Err(Error::invalid("was announced but not written")).in_tensor(name);
        }
        for (path, file) in &self.files {
            file.sync_all().at(path)?;
        }
        if self.files.len() == 1 {
            return Ok(());
        }
        let weight_map: Map<String, Value> = self
            .places
            .iter()
            .map(|(name, place)| {
                let file = self.files[place.file].0.file_name().unwrap_or_default();
                (name.clone(), json!(file.to_string_lossy()))
            })
            .collect();
        let index = json!({ "metadata": { "total_size": self.total }, "weight_map": weight_map });
        let text = serde_json::to_string_pretty(&index)? + "\n";
        write_atomic(self.folder.join("model.safetensors.index.json"), text.as_bytes())
    }

    fn seek(&mut self, name: &str) -> Result<(&Path, &mut File, &mut Place)> {
        let Some(place) = self.places.get_mut(name) else {
            return Err(Error::invalid("was not announced, so there is no room for it")).in_tensor(name);
        };
        let (path, file) = &mut self.files[place.file];
        file.seek(SeekFrom::Start(place.start as u64)).at(&*path)?;
        Ok((path, file, place))
    }
}

/// Writes a few tensors to one file, whole or not at all.
pub fn write_safetensors(
    path: impl AsRef<Path>,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let specs =
        tensors.iter().map(|(name, tensor)| TensorSpec::of(name, tensor)).collect::<Result<Vec<_>>>()?;
    write_one_by_one(path, &specs, metadata, |name| Ok(tensors[name].clone()))
}

/// The same with tensors that are made when it is their turn: `values` gives what was announced under a name.
pub fn write_one_by_one(
    path: impl AsRef<Path>,
    tensors: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    mut values: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let layout = Layout::new(&tensors.iter().collect::<Vec<_>>(), metadata)?;
    replace_file(path.as_ref(), |file| {
        file.write_all(&layout.header)?;
        for (spec, _, bytes) in &layout.places {
            let tensor = values(&spec.name)?;
            let found = tensor.elem_count() * tensor.dtype().size_in_bytes();
            if found != *bytes {
                return Err(Error::invalid(format!("expected {bytes} bytes, found {found}")))
                    .in_tensor(&spec.name);
            }
            write_values(file, &tensor)?;
        }
        Ok(())
    })
}

/// Puts other values in the place of some that a file has from byte `start` on. For files that nobody else sees yet:
/// nothing is synced, and a reader would see half of it.
pub fn overwrite(path: &Path, start: usize, tensor: &Tensor) -> Result<()> {
    let mut file = File::options().write(true).open(path).at(path)?;
    file.seek(SeekFrom::Start(start as u64)).at(path)?;
    write_values(&mut file, tensor).at(path)
}

/// Where everything is in a file.
struct Layout<'a> {
    header: Vec<u8>,
    /// Tensor, first byte, number of bytes; without gaps in this order.
    places: Vec<(&'a TensorSpec, usize, usize)>,
    end: usize,
}

impl<'a> Layout<'a> {
    fn new(tensors: &[&'a TensorSpec], metadata: &BTreeMap<String, String>) -> Result<Self> {
        let mut sorted = tensors.to_vec();
        sorted.sort_by(|x, y| y.dtype.cmp(&x.dtype).then_with(|| x.name.cmp(&y.name)));
        let mut notes = Map::from_iter([("format".to_string(), json!("pt"))]);
        notes.extend(metadata.iter().map(|(key, value)| (key.clone(), json!(value))));
        let mut table = Map::from_iter([("__metadata__".to_string(), Value::Object(notes))]);
        let mut places = Vec::with_capacity(sorted.len());
        let mut end = 0;
        for spec in sorted {
            let bytes = spec.size_in_bytes()?;
            let entry =
                json!({ "dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + bytes] });
            table.insert(spec.name.clone(), entry);
            places.push((spec, end, bytes));
            end += bytes;
        }
        let mut text = serde_json::to_vec(&table)?;
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        for place in &mut places {
            place.1 += header.len();
        }
        Ok(Self { end: end + header.len(), header, places })
    }
}

fn safetensors_dtype(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::U8 => Dtype::U8,
        DType::U32 => Dtype::U32,
        DType::I64 => Dtype::I64,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        _ => return None,
    })
}

fn write_values(file: &mut File, tensor: &Tensor) -> Result<()> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::invalid("values are not in main memory"));
    };
    match storage {
        CpuStorage::U8(values) => file.write_all(&values[range])?,
        CpuStorage::U32(values) => write_pieces(file, &values[range], |value| value.to_le_bytes())?,
        CpuStorage::I64(values) => write_pieces(file, &values[range], |value| value.to_le_bytes())?,
        CpuStorage::BF16(values) => write_pieces(file, &values[range], |value| value.to_le_bytes())?,
        CpuStorage::F16(values) => write_pieces(file, &values[range], |value| value.to_le_bytes())?,
        CpuStorage::F32(values) => write_pieces(file, &values[range], |value| value.to_le_bytes())?,
        CpuStorage::F64(values) => write_pieces(file, &values[range], |value| value.to_le_bytes())?,
        _ => return Err(Error::invalid(format!("{} cannot be stored", tensor.dtype().as_str()))),
    }
    Ok(())
}

fn write_pieces<T: Copy, const N: usize>(
    file: &mut File,
    values: &[T],
    bytes_of: impl Fn(T) -> [u8; N],
) -> std::io::Result<()> {
    const PIECE: usize = 128 * 1024;
    let mut buffer = vec![0u8; values.len().min(PIECE) * N];
    for piece in values.chunks(PIECE) {
        let buffer = &mut buffer[..piece.len() * N];
        for (out, value) in buffer.chunks_exact_mut(N).zip(piece) {
            out.copy_from_slice(&bytes_of(*value));
        }
        file.write_all(buffer)?;
    }
    Ok(())
}
