"""The inference benchmark in plain sentences, made from its numbers."""

from collections.abc import Sequence

CLEAR = 1.5  # an advantage that is worth its memory


def reading(rows: Sequence[dict], communication: Sequence[dict] = ()) -> str:
    """Where the mixture of experts wins, at which batch that ends, where it goes, and what spreading the experts costs.

    Args:
      rows: of `bench_inference.rows`.
      communication: of `bench_inference_comm.rows`.
    """
    names = dict.fromkeys(row["experts"] for row in rows)
    lines = [line for name in names for line in _family(name, [row for row in rows if row["experts"] == name])]
    return "\n".join(lines + list(_communication(rows, communication)))


def _family(name, rows):
    decode = {model: [r for r in rows if (r["model"], r["phase"]) == (model, "decode")] for model in ("moe", "dense_total")}
    experts, top_k = name.split("x")
    first = decode["moe"][0]
    yield (
        f"{experts} experts, {top_k} a token, {first['parameters'] / 1e6:,.0f} M parameters, {first['active'] / 1e6:,.0f} M of them active."
        f" Decoding {_texts(first)} takes {first['milliseconds']:.2f} ms a step: {first['ratio_to_dense_active']:.2f} times the dense model"
        f" of equal active parameters, {first['ratio_to_dense_total']:.2f} times that of equal total parameters."
    )
    yield "  " + _advantage(decode["moe"])
    touched = ", ".join(f"{r['distinct_experts']:.1f} at batch {r['batch']}" for r in decode["moe"])
    moved = ", ".join(
        f"{a['bytes_per_token'] / b['bytes_per_token']:.2f} at batch {a['batch']}"
        for a, b in zip(*decode.values(), strict=True)
    )
    yield (
        f"  Where it goes: a layer's tokens choose {touched} different experts, of {experts}. Of the bytes of the dense model of equal"
        f" total parameters a step moves {moved}. {_bound(decode['dense_total'])} A token is multiplied by"
        f" {first['active'] / first['parameters']:.2f} of the parameters at any batch."
    )
    attained = ", ".join(f"{r['ratio_to_roofline']:.2f} at batch {r['batch']}" for r in decode["moe"])
    yield f"  Of what the machine's bandwidth and products allow it has {attained}."
    for row in (r for r in rows if (r["model"], r["phase"]) == ("moe", "prefill")):
        yield (
            f"  Reading a prompt: {row['tokens_per_second']:,.0f} tokens/s, {row['ratio_to_dense_active']:.2f} times the time of the dense"
            f" model of equal active parameters, {row['ratio_to_dense_total']:.2f} times that of equal total parameters."
        )


def _advantage(moe):
    """Over the dense model of equal total parameters, by batch."""
    speeds = {row["batch"]: 1 / row["ratio_to_dense_total"] for row in moe}
    told = ", ".join(f"{speed:.2f} at batch {batch}" for batch, speed in speeds.items())
    weak, slow = _batches(b for b, s in speeds.items() if s < CLEAR), _batches(b for b, s in speeds.items() if s < 1)
    end = f"less than {CLEAR} times at {weak}" if weak else f"at least {CLEAR} times at every batch"
    return (
        f"Speed in that of the dense model of equal total parameters: {told}; {end}{f', and slower at {slow}' if slow else ''}."
    )


def _bound(dense):
    """Whether the dense model's step waits for memory or for products, by what the machine did beside it."""
    memory = [
        row["batch"] for row in dense if row["needed_bytes_per_token"] / row["bandwidth"] > row["flops_per_token"] / row["peak"]
    ]
    if len(memory) == len(dense):
        return "That model waits for its weights at every batch."
    if not memory:
        return "That model waits for its products at every batch."
    return f"That model waits for its weights at {_batches(memory)}, where weights not read are time saved, and for its products beyond."


def _batches(batches):
    """ "batch 4", "batches 4, 16"; "" for none."""
    names = [str(batch) for batch in batches]
    return f"batch{'es' if len(names) > 1 else ''} {', '.join(names)}" if names else ""


def _communication(rows, communication):
    for row in communication:
        if row["collective"] != "all-to-all":
            continue
        moved = next(
            r["bytes_per_token"]
            for r in rows
            if (r["experts"], r["batch"], r["model"], r["phase"]) == (row["experts"], row["batch"], "moe", "decode")
        )
        yield (
            f"Experts {row['experts']} over 8 devices, batch {row['batch']}: the exchange sends {_kilobytes(row['bytes_per_token'])} for a"
            f" token in all layers, of which {_kilobytes(row['needed_bytes_per_token'])} carry something; it is"
            f" {row['bytes_per_token'] / moved:.2f} of the bytes that one device alone moves in its memory for the token."
        )


def _kilobytes(number):
    return f"{number / 1e3:,.0f} kB"


def _texts(row):
    return "one text" if row["batch"] == 1 else f"{row['batch']} texts"
