"""Rates of GPUs fitted to published measurements. Written by benchmarks/fit_hardware.py, never by hand.

Each entry is fitted to all rows that its comment names; the errors are those, on one half of the shapes, of the same
model fitted to the other half.
"""

from __future__ import annotations

from zgraph.curves import Collective, Matmul

MATMULS = {
    # xla_gemm.csv, 375 rows bf16xbf16->bf16; held out: median 3.5%, 90th percentile 7.8% of 188 rows
    ("H100", "bfloat16"): Matmul(
        rate=794000000000000.0,
        in_bytes=2,
        out_bytes=2,
        bytes_per_s=3180000000000.0,
        fixed_s=5.18e-06,
        units=132,
        tile=128,
        quantisation=0.197,
        ramp_k=120.0,
    ),
    # xla_gemm.csv, 375 rows f32xf32->f32; held out: median 10.6%, 90th percentile 28.7% of 188 rows
    ("H100", "tf32"): Matmul(
        rate=397000000000000.0,
        in_bytes=4,
        out_bytes=4,
        bytes_per_s=3180000000000.0,
        fixed_s=7.2e-06,
        units=132,
        tile=128,
        quantisation=0.001,
        ramp_k=0.1,
        overlap=0.316,
    ),
    # xla_gemm.csv, 375 rows bf16xbf16->bf16; held out: median 1.7%, 90th percentile 5.2% of 188 rows
    ("B200", "bfloat16"): Matmul(
        rate=1620000000000000.0,
        in_bytes=2,
        out_bytes=2,
        bytes_per_s=6230000000000.0,
        fixed_s=5.22e-06,
        units=148,
        tile=128,
        quantisation=0.316,
        ramp_k=237.0,
    ),
    # xla_gemm.csv, 375 rows f32xf32->f32; held out: median 2.7%, 90th percentile 9.8% of 188 rows
    ("B200", "tf32"): Matmul(
        rate=872000000000000.0,
        in_bytes=4,
        out_bytes=4,
        bytes_per_s=7340000000000.0,
        fixed_s=6.76e-06,
        units=148,
        tile=128,
        quantisation=0.211,
        ramp_k=139.0,
        overlap=0.82,
    ),
    # xla_gemm.csv, 375 rows f8e4m3fnxf8e4m3fn->bf16; held out: median 3.2%, 90th percentile 12.5% of 188 rows
    ("B200", "float8_e4m3fn"): Matmul(
        rate=3490000000000000.0,
        in_bytes=1,
        out_bytes=2,
        bytes_per_s=6120000000000.0,
        fixed_s=5.44e-06,
        units=148,
        tile=128,
        quantisation=0.353,
        ramp_k=277.0,
        overlap=0.846,
    ),
    # xla_gemm.csv, 376 rows bf16xbf16->bf16; held out: median 10.0%, 90th percentile 29.4% of 188 rows
    ("MI300X", "bfloat16"): Matmul(
        rate=626000000000000.0,
        in_bytes=2,
        out_bytes=2,
        bytes_per_s=4410000000000.0,
        fixed_s=6.85e-06,
        units=304,
        tile=128,
        quantisation=0.001,
        ramp_k=0.1,
        overlap=0.001,
    ),
    # xla_gemm.csv, 375 rows f32xf32->f32; held out: median 14.6%, 90th percentile 38.7% of 188 rows
    ("MI300X", "tf32"): Matmul(
        rate=233000000000000.0,
        in_bytes=4,
        out_bytes=4,
        bytes_per_s=3790000000000.0,
        fixed_s=6.79e-06,
        units=304,
        tile=128,
        quantisation=0.001,
        ramp_k=29.3,
        overlap=0.001,
    ),
}

COLLECTIVES = {
    # xla_collectives.csv, 54 rows; held out: median 5.0%, 90th percentile 31.2% of 27 rows
    ("H100", "all_gather"): Collective(
        latency_s=1.01e-05,
        per_rank_s=1.56e-06,
        bandwidth=380000000000.0,
        small_group=0.574,
        ramp_s=2.69e-05,
        ramp_bytes=3000000.0,
    ),
    # xla_collectives.csv, 54 rows; held out: median 7.2%, 90th percentile 53.7% of 27 rows
    ("H100", "reduce_scatter"): Collective(
        latency_s=1.85e-05,
        per_rank_s=1.85e-06,
        bandwidth=375000000000.0,
        small_group=0.95,
        ramp_s=6.33e-05,
        ramp_bytes=97300000.0,
    ),
    # xla_collectives.csv, 54 rows; held out: median 6.1%, 90th percentile 32.1% of 27 rows
    ("H100", "all_reduce"): Collective(
        latency_s=1.18e-05,
        per_rank_s=3.48e-06,
        bandwidth=412000000000.0,
        small_group=0.837,
        ramp_s=3.84e-05,
        ramp_bytes=6090000.0,
        rounds=2,
    ),
    # xla_collectives.csv, 54 rows; held out: median 9.8%, 90th percentile 61.5% of 27 rows
    ("H100", "all_to_all"): Collective(
        latency_s=3.03e-05,
        per_rank_s=4.37e-07,
        bandwidth=366000000000.0,
        small_group=0.307,
        ramp_s=4.17e-05,
        ramp_bytes=10800000.0,
    ),
    # xla_collectives.csv, 54 rows; held out: median 12.8%, 90th percentile 30.4% of 27 rows
    ("B200", "all_gather"): Collective(
        latency_s=2.1e-05,
        per_rank_s=1.76e-06,
        bandwidth=677000000000.0,
        small_group=0.699,
        ramp_s=1.93e-05,
        ramp_bytes=4600000.0,
    ),
    # xla_collectives.csv, 54 rows; held out: median 12.5%, 90th percentile 31.9% of 27 rows
    ("B200", "reduce_scatter"): Collective(
        latency_s=2.81e-05,
        per_rank_s=1.33e-06,
        bandwidth=736000000000.0,
        small_group=0.714,
        ramp_s=7.46e-05,
        ramp_bytes=126000000.0,
    ),
    # xla_collectives.csv, 54 rows; held out: median 8.3%, 90th percentile 33.2% of 27 rows
    ("B200", "all_reduce"): Collective(
        latency_s=2.09e-05,
        per_rank_s=4.09e-06,
        bandwidth=660000000000.0,
        small_group=0.56,
        ramp_s=4.66e-05,
        ramp_bytes=17800000.0,
        rounds=2,
    ),
    # xla_collectives.csv, 54 rows; held out: median 9.5%, 90th percentile 16.3% of 27 rows
    ("B200", "all_to_all"): Collective(
        latency_s=3.13e-05,
        per_rank_s=2.06e-07,
        bandwidth=693000000000.0,
        small_group=0.942,
        ramp_s=3.32e-05,
        ramp_bytes=4310000.0,
    ),
    # xla_collectives.csv, 105 rows; held out: median 27.8%, 90th percentile 43.7% of 51 rows
    ("MI300X", "all_gather"): Collective(
        latency_s=0.00023,
        per_rank_s=1.25e-05,
        bandwidth=46400000000.0,
        ramp_s=4.01e-05,
        ramp_bytes=1980000.0,
        mesh=True,
    ),
    # xla_collectives.csv, 105 rows; held out: median 21.2%, 90th percentile 71.0% of 51 rows
    ("MI300X", "reduce_scatter"): Collective(
        latency_s=0.000409,
        per_rank_s=1e-08,
        bandwidth=46400000000.0,
        ramp_s=1e-07,
        ramp_bytes=100000.0,
        mesh=True,
    ),
    # xla_collectives.csv, 105 rows; held out: median 24.5%, 90th percentile 45.1% of 51 rows
    ("MI300X", "all_reduce"): Collective(
        latency_s=0.0002,
        per_rank_s=6.24e-06,
        bandwidth=46500000000.0,
        ramp_s=0.000152,
        ramp_bytes=19700000.0,
        rounds=2,
        mesh=True,
    ),
    # xla_collectives.csv, 105 rows; held out: median 28.0%, 90th percentile 41.4% of 51 rows
    ("MI300X", "all_to_all"): Collective(
        latency_s=0.000426,
        per_rank_s=1.73e-05,
        bandwidth=48000000000.0,
        ramp_s=1e-07,
        ramp_bytes=100000.0,
        mesh=True,
    ),
    # BW-001 to 012; held out: median 7.7%, 90th percentile 36.4% of 6 rows
    ("A100", "all_reduce"): Collective(
        latency_s=7.8e-05,
        per_rank_s=0.0,
        bandwidth=241000000000.0,
        ramp_s=0.000618,
        ramp_bytes=390000000.0,
        rounds=2,
    ),
    # BW-013 to 019; held out: median 6.4%, 90th percentile 11.9% of 4 rows
    ("H200", "all_reduce"): Collective(
        latency_s=3.76e-05,
        per_rank_s=0.0,
        bandwidth=479000000000.0,
        ramp_s=6.51e-05,
        ramp_bytes=24100000.0,
        rounds=2,
    ),
}

# BW-025 to 037 and BW-052 to 057, between nodes; on these rows: median 12.1%, 90th percentile 41.2% of 13 rows
NETWORK_EFFICIENCY = 0.802
NETWORK_LATENCY_S = 3.39e-05
NETWORK_RAMP_S = 0.000683
NETWORK_RAMP_BYTES = 339000.0
