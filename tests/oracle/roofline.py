"""The roofline as its formulas are written down, slowly and in one place."""

from __future__ import annotations

LINEAR_BYTES = {"bf16": 2, "fp8": 1, "int8": 1, "int4": 0.51953125, "mxfp4": 2}
EXPERT_BYTES = LINEAR_BYTES | {"mxfp4": 0.53125}
BF16_PEAK = ("bf16", "int4", "mxfp4")


def iteration_time(deployment, factors, batch, cpu_overhead, imbalance=1.0):
    """Return the seconds of an iteration: the time summed over the stages."""
    model, device, f = deployment.model, deployment.device, factors
    tp, pp, dp = (
        deployment.tensor_parallel_size,
        deployment.pipeline_parallel_size,
        deployment.data_parallel_size,
    )
    quantization = deployment.quantization or model.quantization or "bf16"
    kv_bytes = 1 if deployment.kv_cache_dtype == "fp8" else 2
    h, hd, nq = model.hidden_size, model.head_dim, model.num_heads / tp
    bf16 = device.bf16_dense_tflops * 1e12
    bandwidth = device.memory_bandwidth_gbps * 1e9
    link = device.scaleup_bidir_gbps * 1e9 / 2
    gates = 2 if model.gated_mlp else 1
    T, S = batch.num_tokens, batch.num_decodes + len(batch.prefills)  # noqa: N806
    window, latent = model.sliding_window, model.kv_latent_size

    def smax(a, b):
        return (a**f.smoothness + b**f.smoothness) ** (1 / f.smoothness)

    def peak(kind):
        other = {"fp8": device.fp8_dense_tflops, "int8": device.int8_dense_tops}.get(kind)
        return other * 1e12 if other and other * 1e12 > bf16 else bf16

    def elementwise(values):
        return values * 2 / (bandwidth * f.elementwise_memory) + f.kernel_time

    def gemm(m, n, k, kind="bf16"):
        flops = peak(kind) * (f.quantized_compute if peak(kind) > bf16 else 1)
        efficiency = f.gemm_compute * m / (m + f.gemm_half_efficiency_rows)
        memory = ((m * k + m * n) * 2 + n * k * LINEAR_BYTES[kind]) / (bandwidth * f.gemm_memory)
        return smax(2 * m * n * k / (flops * efficiency), memory) + f.kernel_time

    def gemm_of_layer(m, n, k):
        return gemm(m, n, k, "bf16" if quantization == "mxfp4" else quantization)

    def collective(devices, num_bytes):
        latency = f.all_reduce_time * (devices / 2) ** f.all_reduce_time_growth
        share = f.all_reduce_link * (devices / 2) ** f.all_reduce_link_growth
        return latency + num_bytes / (link * share)

    def all_reduce():
        if tp == 1:
            return 0
        large = f.large_all_reduce_time if T * h * 2 >= 8 * 2**20 else 0
        return large + collective(tp, 2 * (tp - 1) / tp * T * h * 2)

    def attended(limit):
        """Pairs and context, token by token, if no token sees more than `limit` tokens."""
        pairs = context = 0
        for c, end in batch.prefills:
            pairs += sum(min(end - c + i, limit) for i in range(1, c + 1))
            context += min(end, c + limit)
        return pairs, context

    def prefill_attention(limit, flops_per_pair, context_bytes, token_bytes):
        pairs, context = attended(limit)
        num_tokens = sum(c for c, _ in batch.prefills)
        compute = flops_per_pair * (pairs + f.prefill_extra_context * num_tokens)
        memory = (context * context_bytes + num_tokens * token_bytes) / (
            bandwidth * f.prefill_memory
        )
        return smax(compute / (bf16 * f.prefill_compute), memory) + f.attention_time

    def grouped_query_attention(limit):
        nkv = max(model.num_kv_heads / tp, 1)
        layer = gemm_of_layer(T, (nq + 2 * nkv) * hd, h) + gemm_of_layer(T, h, nq * hd)
        if batch.prefills:
            context_bytes = 2 * nkv * hd * kv_bytes
            layer += prefill_attention(limit, 4 * nq * hd, context_bytes, 2 * nq * hd * 2)
        if batch.num_decodes:
            context = min(batch.decode_context, batch.num_decodes * limit)
            memory = 2 * context * nkv * hd * kv_bytes
            layer += memory / (bandwidth * f.decode_memory) + f.attention_time
        return layer

    def latent_attention(limit):
        q_rank, rope, vd = model.query_latent_size, model.rope_head_dim, model.value_head_dim
        rank, nope = latent - rope, hd - rope
        if q_rank:
            layer = gemm_of_layer(T, q_rank + latent, h) + gemm_of_layer(T, nq * hd, q_rank)
        else:
            layer = gemm_of_layer(T, latent + nq * hd, h)
        layer += gemm_of_layer(T, h, nq * vd) + f.latent_time
        if batch.prefills:
            context = sum(end for _, end in batch.prefills)
            layer += gemm_of_layer(context, nq * (nope + vd), rank)
            width = nq * (hd + vd)
            layer += prefill_attention(limit, 2 * width, width * 2, width * 2)
        if batch.num_decodes:
            layer += gemm_of_layer(batch.num_decodes, nq * (nope + vd), rank)
            compute = 2 * nq * (latent + rank) * batch.decode_context
            memory = latent * kv_bytes * batch.decode_context / (bandwidth * f.latent_memory)
            layer += smax(compute / (bf16 * f.prefill_compute), memory) + f.attention_time
        return layer

    def mlp(width):
        up = gemm_of_layer(T, gates * width / tp, h)
        return up + elementwise((gates + 1) * T * width / tp) + gemm_of_layer(T, h, width / tp)

    def mixture():
        E, k = model.num_experts, model.experts_per_token  # noqa: N806
        ep, whole = tp * dp, deployment.enable_expert_parallel
        width = model.moe_intermediate_size / (1 if whole else ep)
        held = E / ep if whole else E
        rows = T * dp * k * held / E * (imbalance if whole else 1)
        hit = held * (1 - (1 - k / E) ** (T * dp))
        flops = peak(quantization) * f.gemm_compute * f.expert_compute
        flops *= f.quantized_compute if peak(quantization) > bf16 else 1
        time = gemm(T, E, h)
        for n, depth in ((gates * width, h), (h, width)):
            memory = rows * (n + depth) * 2 + hit * n * depth * EXPERT_BYTES[quantization]
            time += smax(2 * rows * n * depth / flops, memory / (bandwidth * f.gemm_memory))
        moved = rows * (4 * h + (gates + 1) * width) * 2
        time += moved / (bandwidth * f.elementwise_memory * f.expert_memory) + f.expert_time
        if model.num_shared_experts:
            time += mlp(model.num_shared_experts * model.moe_intermediate_size)
        if dp > 1:
            copies = (ep - 1) * (1 - (1 - 1 / ep) ** k) if whole else dp - 1
            time += 2 * collective(ep, T / tp * copies * h * 2)
        return time

    attention = latent_attention if latent else grouped_query_attention
    sliding = model.num_sliding_layers
    total = (model.num_layers - sliding) * attention(float("inf"))
    total += sliding * attention(window) if sliding else 0
    total += model.num_layers * 2 * (elementwise(4 * T * h) + all_reduce())
    mixtures = model.num_layers - model.num_dense_layers if model.num_experts else 0
    if mixtures < model.num_layers:
        total += (model.num_layers - mixtures) * mlp(model.intermediate_size)
    if mixtures:
        total += mixtures * mixture()
    sends = (pp - 1) * (10e-6 + T * h * 2 / link)
    return total + gemm(S, model.vocab_size / tp, h) + sends + cpu_overhead
