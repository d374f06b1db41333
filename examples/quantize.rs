//! Writes a GGUF file anew with its matrices in another format: `cargo run --release --example quantize -- IN OUT TYPE`,
//! TYPE as candle spells it (`Q4_0`, `Q8_0`, `Q4K`, ..). Rows that are no whole number of 256-value blocks get the 32-value
//! format that llama.cpp takes instead. To try formats out: values that were quantized before lose a second time.

#![expect(clippy::print_stdout, reason = "a program that prints")]

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;

use candle_core::Device;
use candle_core::quantized::gguf_file::{self, Content};
use candle_core::quantized::{GgmlDType, QTensor};

const TYPES: [GgmlDType; 11] = [
    GgmlDType::F32,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, target, name] = &arguments[..] else { return Err("usage: quantize IN OUT TYPE".into()) };
    let wanted = TYPES
        .into_iter()
        .find(|dtype| format!("{dtype:?}").eq_ignore_ascii_case(name))
        .ok_or_else(|| format!("`{name}` is not one of {TYPES:?}"))?;
    let mut file = File::open(source)?;
    let content = Content::read(&mut file)?;
    let mut tensors = BTreeMap::new();
    for (name, info) in &content.tensor_infos {
        let tensor = content.tensor(&mut file, name, &Device::Cpu)?;
        let dims = info.shape.dims();
        let dtype = if dims.len() == 2 { fitting(wanted, dims[1]) } else { GgmlDType::F32 };
        tensors.insert(name.clone(), QTensor::quantize(&tensor.dequantize(&Device::Cpu)?, dtype)?);
    }
    let mut metadata: Vec<_> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    metadata.sort_by_key(|(key, _)| *key);
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(target)?, &metadata, &tensors)?;
    println!("{target}: {} MiB", File::open(target)?.metadata()?.len() >> 20);
    Ok(())
}

/// The format, or what stands in for it where rows do not fit its blocks.
fn fitting(wanted: GgmlDType, columns: usize) -> GgmlDType {
    if columns.is_multiple_of(wanted.block_size()) {
        return wanted;
    }
    match wanted {
        GgmlDType::Q2K | GgmlDType::Q3K => GgmlDType::Q4_0,
        GgmlDType::Q4K => GgmlDType::Q5_0,
        GgmlDType::Q5K => GgmlDType::Q5_1,
        _ => GgmlDType::Q8_0,
    }
}
