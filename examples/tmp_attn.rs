use candle_core::{DType, Device, Tensor};
use peft::ops::attention::{self, Heads};
use peft::ops::{Documents, KeepBuffers};
use std::time::Instant;
#[global_allocator]
static ALLOCATOR: KeepBuffers<mimalloc::MiMalloc> = KeepBuffers::new(mimalloc::MiMalloc);
fn main() {
    let threads: usize = std::env::args().nth(1).unwrap().parse().unwrap();
    let dt = if std::env::args().nth(2).as_deref() == Some("f32") { DType::F32 } else { DType::BF16 };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().unwrap();
    let heads = Heads { num_heads: 9, num_kv_heads: 3, head_dim: 64, window: None, scale: 0.125 };
    let n = 2048;
    let documents = Documents::new(vec![0, 512, 1024, 1536, 2048], vec![0, 1, 2, 3]);
    let r = |w: usize| Tensor::randn(0f32, 1.0, (n, w), &Device::Cpu).unwrap().to_dtype(dt).unwrap();
    let (q, k, v, d_o) = (r(576), r(192), r(192), r(576));
    let (mut bf, mut bb) = (1e9f64, 1e9f64);
    for _ in 0..40 {
        let t = Instant::now();
        let (_, saved) = attention::forward(q.clone(), k.clone(), v.clone(), &heads, &documents).unwrap();
        bf = bf.min(t.elapsed().as_secs_f64());
        let t = Instant::now();
        attention::backward(&saved, &heads, &documents, &d_o).unwrap();
        bb = bb.min(t.elapsed().as_secs_f64());
    }
    let f = 4.0 * 512.0 * 512.0 / 2.0 * 64.0 * 9.0 * 4.0 / 1e9;
    println!(
        "forward {:.2} ms {:.0} GFLOP/s, backward {:.2} ms {:.0} GFLOP/s",
        bf * 1e3,
        f / bf,
        bb * 1e3,
        2.5 * f / bb
    );
}
