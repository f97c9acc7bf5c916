"""What the field's attention kernels take at DeepSeek-V3.2's shapes, in milliseconds: measured, with their source.

4,096 queries, or as many sequences as the batch says; 128 heads; keyed by context, or by (context, queries or batch).
"""

SOURCE = (
    "one H100 80GB HBM3 in November 2026, each peer's own kernel, random inputs, L2 flushed before each run, median: "
    "FlashMLA and FA3 of vLLM 0.24.0, TileLang 0.1.14's deepseek_v32 examples, torch 2.11 with cuDNN 9.19"
)

# milliseconds, by context
PREFILL_PEERS = {
    8192: {"FlashMLA": 4.085, "TileLang pipelined": 4.470},
    32768: {"FlashMLA": 4.313, "TileLang pipelined": 4.598},
    65536: {"FlashMLA": 4.537, "TileLang pipelined": 4.700},
    131072: {"FlashMLA": 4.740, "TileLang pipelined": 4.894},
}
# FlashMLA by context and number of queries in the launch
SMALL_LAUNCH_PEERS = {
    (8192, 128): 0.139, (8192, 512): 0.501, (8192, 1024): 1.042,
    (131072, 128): 0.155, (131072, 512): 0.588, (131072, 1024): 1.216,
}  # fmt: skip
# FlashMLA on the fp8 cache; FlashMLA's prefill kernel on a bf16 cache
DECODE_PEERS = {
    (8192, 1): (0.0244, 0.0636), (8192, 8): (0.0349, 0.0676), (8192, 32): (0.0742, 0.0759),
    (8192, 64): (0.1122, 0.0878), (8192, 128): (0.2142, 0.1638),
    (32768, 1): (0.0251, 0.0692), (32768, 8): (0.0360, 0.0714), (32768, 32): (0.0756, 0.0780),
    (32768, 64): (0.1135, 0.0891), (32768, 128): (0.2459, None),
    (131072, 1): (0.0270, 0.0730), (131072, 8): (0.0365, 0.0727), (131072, 32): (0.0796, None),
    (131072, 64): (0.1367, None), (131072, 128): (0.2658, None),
}  # fmt: skip
# dense decode: FlashMLA bf16, FA3 bf16, FlashMLA fp8
DENSE_DECODE_PEERS = {
    (8192, 1): (0.0449, 0.0307, 0.0244), (8192, 8): (0.0750, 0.0566, 0.0482), (8192, 32): (0.1562, 0.1518, 0.1261),
    (8192, 64): (0.2705, 0.2573, 0.2219), (8192, 128): (0.5585, None, 0.4287),
    (32768, 1): (0.0730, 0.0516, 0.0348), (32768, 8): (0.1684, 0.1438, 0.1211), (32768, 32): (0.5270, 0.4821, 0.4148),
    (32768, 64): (1.0203, 1.0401, 0.7852), (32768, 128): (2.0809, None, 1.7101),
    (65536, 1): (0.0843, 0.0650, 0.0483), (65536, 8): (0.2809, 0.2468, 0.2136), (65536, 32): (0.9894, 1.0532, 0.9094),
    (65536, 64): (1.9740, 2.1084, 1.7198), (65536, 128): (4.0257, 3.9831, 3.2986),
    (131072, 1): (0.1200, 0.1132, 0.0778), (131072, 8): (0.5215, 0.5078, 0.4420),
    (131072, 32): (2.0497, 2.1421, 1.6747), (131072, 64): (4.1781, 4.3850, 3.2958),
    (131072, 128): (8.0538, None, 6.4311),
}  # fmt: skip
# dense prefill: FA3 causal, cuDNN SDPA without a mask
DENSE_PREFILL_PEERS = {8192: (2.954, 4.409), 32768: (14.280, 19.085), 65536: (29.301, 36.020), 131072: (60.517, 71.761)}
# the best peers in one sequence: sparse, dense FA3
STEP_PREFILL_PEERS = {8192: (4.62, 3.11), 32768: (6.50, 16.12), 65536: (9.17, 29.37), 131072: (15.49, 59.97)}
# the same for a whole prompt, sparse in chunks of 4,096 queries
STEP_PROMPT_PEERS = {8192: (9.05, 4.43), 16384: (19.26, 15.68), 32768: (44.29, 61.61), 65536: (111.7, 248.8)}
# which ones: prefill and prompt, and decode
STEP_PREFILL_NAME = "DeepGEMM, vLLM top-k, FlashMLA in sequence"
STEP_DECODE_NAME = "DeepGEMM, vLLM top-k, FlashMLA in one graph"
# milliseconds that the first version must reach, and the aim: by context; by context and batch
STEP_PREFILL_BARS = {32768: (8.0, 6.0), 131072: (18.0, 14.0)}
STEP_DECODE_BARS = {(32768, 64): (0.37, 0.24), (131072, 64): (0.80, 0.55)}
# the best peers in one graph: sparse, dense FlashMLA bf16, dense FA3, dense FlashMLA fp8
STEP_DECODE_PEERS = {
    (8192, 1): (0.0496, 0.0440, 0.0307, 0.0244), (8192, 8): (0.0622, 0.0748, 0.0566, 0.0482),
    (8192, 32): (0.1147, 0.1567, 0.1518, 0.1261), (8192, 64): (0.1566, 0.2704, 0.2573, 0.2219),
    (8192, 128): (0.2863, 0.5567, None, 0.4287),
    (32768, 1): (0.0550, 0.0729, 0.0516, 0.0348), (32768, 8): (0.0826, 0.1674, 0.1438, 0.1211),
    (32768, 32): (0.1627, 0.5280, 0.4821, 0.4148), (32768, 64): (0.2578, 1.0546, 1.0401, 0.7852),
    (32768, 128): (0.4921, 2.0026, None, 1.7101),
    (65536, 1): (0.0643, 0.0958, 0.0650, 0.0483), (65536, 8): (0.1035, 0.2876, 0.2468, 0.2136),
    (65536, 32): (0.2301, 1.0079, 1.0532, 0.9094), (65536, 64): (0.3831, 2.0599, 2.1084, 1.7198),
    (65536, 128): (0.6981, 4.2575, 3.9831, 3.2986),
    (131072, 1): (0.0707, 0.1207, 0.1132, 0.0778), (131072, 8): (0.1271, 0.5199, 0.5078, 0.4420),
    (131072, 32): (0.3373, 2.0708, 2.1421, 1.6747), (131072, 64): (0.5979, 4.2266, 4.3850, 3.2958),
    (131072, 128): (1.1012, 8.9478, None, 6.4311),
}  # fmt: skip
