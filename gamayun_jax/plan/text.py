"""Plans (aot.py) as text: one for a person, several as a table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gamayun_jax.tables import Table
from gamayun_jax.training.chips import GIB


def mesh_name(mesh: Mapping[str, int]) -> str:
    """ "data 16 x fsdp 16": the axes that are more than 1."""
    return " x ".join(f"{k} {n}" for k, n in mesh.items() if n != 1) or "1 device"


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def format_plan(p: Mapping[str, Any]) -> str:
    """A plan for a person."""
    m, s, a = p["memory"], p["seconds"], p["assumptions"]
    unit = "chip" if p["devices"] == p["chips"] else "device"
    lines = [
        f"{p['config']}, {p['parameters'] / 1e9:.3f}B parameters, on "
        f"{p['slices']} x {p['topology']} = {p['chips']} chips"
        + (f", {p['devices']} devices" if unit == "device" else ""),
        f"mesh       {mesh_name(p['mesh'])}; {p['rows_per_device']} examples a device "
        f"in {p['microbatches']} microbatches; remat {p['remat']}",
        *memory_lines(m, p["hbm_bytes"], unit),
        f"FLOPs      {p['flops_per_token'] / 1e9:.2f}G a token, and "
        f"{p['recomputed_flops_per_token'] / 1e9:.2f}G made again",
        f"moved      GB a device and step, by kind and axis; gradients are summed in "
        f"{p['reduce_dtype']}:",
    ]
    least = sum(p["least_moved_bytes"].values())
    if p["moved_bytes"] is None:
        lines.append(f"           unknown; the least is {least / 1e9:.3f}")
    else:
        lines += [
            f"           {row['bytes'] / 1e9:8.3f}  {row['kind']:<18} "
            f"{'+'.join(row['axes']):<12} {row['dtype']:<5} {row['count']} times"
            for row in p["collectives"]
            if row["bytes"] > 1e6
        ]
        ratio = f"{p['moved_bytes'] / least:.2f} of" if least else "without"
        lines.append(
            f"           {p['moved_bytes'] / 1e9:8.3f}  in all, {ratio} the least "
            f"({least / 1e9:.3f})"
        )
    lines += [f"unknown    {text}" for text in p["unknown"]]
    lines += [
        f"step       {s['step']:.3f} s, bound by {bottleneck(p)}: "
        + ", ".join(f"{k} {s[k]:.3f}" for k in s if k != "step"),
        "           assumed: of the data sheet's peaks "
        + ", ".join(f"{k} {v:.0%}" for k, v in a.items())
        + "; all overlap",
        "           compiler: its own estimates of all but kernels and waiting",
        f"rate       {p['tokens_per_s'] / 1e6:.2f}M tokens/s, "
        f"{p['tokens_per_s_per_chip'] / 1e3:.1f}k a chip, MFU {p['mfu']:.0%}",
        f"budget     {p['tokens'] / 1e12:.3g}T tokens: {p['days']:.1f} days, "
        f"{p['chip_hours']:,.0f} chip-hours"
        + (f", cost {money(p['cost'], p)}" if p["cost"] is not None else ""),
    ]
    if p.get("spot"):
        lines += spot_lines(p["spot"], p)
    if better := p.get("faster"):
        free = gib(p["hbm_bytes"] - m["peak"])
        verb, how = (
            ("takes", "compiled too")
            if better["compiled"]
            else ("would take", "by this roofline alone, not compiled: it may not fit")
        )
        lines.append(
            f"faster     {free} GiB are free: {better['set']} {verb} "
            f"{better['seconds']:.3f} s instead of {s['step']:.3f} ({how})"
        )
    return "\n".join(lines)


def memory_lines(m: Mapping[str, float], hbm: float, unit: str) -> list[str]:
    """Whether a step fits, and what takes the memory; of GPUs a guess."""
    if "total" not in m:
        return [
            f"fits       not known: about {gib(m['peak'])} of {gib(hbm)} GiB a {unit}"
        ]
    return [
        f"fits       yes: peak {gib(m['peak'])} of {gib(hbm)} GiB a {unit} "
        f"(all buffers without reuse {gib(m['total'])})",
        f"memory     parameters {gib(m['parameters'])}, optimiser "
        f"{gib(m['optimiser'])}, "
        + (f"average of parameters {gib(m['average'])}, " if m["average"] else "")
        + f"activations and temporaries {gib(m['temporary'])} GiB"
        + (f", on the host {gib(m['host'])} GiB" if m["host"] else ""),
    ]


def money(amount: float, p: Mapping[str, Any]) -> str:
    """ "1,234 EUR"; without a currency the number alone."""
    return f"{amount:,.0f} {p.get('currency', '')}".rstrip()


def spot_lines(s: Mapping[str, Any], p: Mapping[str, Any]) -> list[str]:
    """What preemptions make of a plan, and when to save under them."""
    cost = f", cost {money(s['cost'], p)}" if s["cost"] is not None else ""
    least, most = s["days_10_90"]
    own = s["own_days"]
    mine = f"{own:.2f} days" if own is not None else "hardly ever done"
    return [
        f"spot       {s['per_day']:g} preemptions a day without notice, each "
        f"{s['restart']:.0f} s to restart after {s['queue'] / 3600:.2g} h without VMs, "
        f"{s['save']:.0f} s a save:",
        f"           {s['days']:.2f} days ({least:.2f} to {most:.2f} in 8 of 10 of "
        f"{s['runs']} simulated runs, seed {s['seed']}), {s['preemptions']:.0f} "
        f"preemptions, goodput {s['goodput']:.0%}, {s['chip_hours']:,.0f} "
        f"chip-hours{cost}",
        f"save       every {s['interval'] / 60:.1f} min is best: "
        f"checkpoint.every_steps={s['every_steps']} (Young {s['young'] / 60:.1f}, Daly "
        f"{s['daly'] / 60:.1f} min); the config's {s['own_every_steps']}: {mine}",
    ]


def bottleneck(plan: Mapping[str, Any]) -> str:
    """What a step's time is bound by."""
    seconds = {k: v for k, v in plan["seconds"].items() if k != "step"}
    return max(seconds, key=lambda k: seconds[k])


def format_table(plans: Sequence[Mapping[str, Any]]) -> str:
    """Plans as a table in Markdown, one a row, and what is not known of them."""
    heads = (
        "topology", "chips", "mesh", "rows x micro", "remat", "peak GiB", "of",
        "moved GB", "of least", "step s", "bound by", "tokens/s/chip", "MFU", "days",
        "chip-hours",
    )  # fmt: skip
    rows, notes = [], []
    for p in plans:
        least, moved = sum(p["least_moved_bytes"].values()), p["moved_bytes"]
        where = f"{p['slices']} x {p['topology']}"
        rows.append(
            (
                where,
                str(p["chips"]),
                mesh_name(p["mesh"]),
                f"{p['rows_per_device']} x {p['microbatches']}",
                p["remat"],
                gib(p["memory"]["peak"]),
                f"{p['hbm_bytes'] / GIB:.0f}",
                "unknown" if moved is None else f"{moved / 1e9:.2f}",
                f"{moved / least:.2f}" if moved is not None and least else "",
                f"{p['seconds']['step']:.3f}",
                bottleneck(p),
                f"{p['tokens_per_s_per_chip'] / 1e3:.1f}k",
                f"{p['mfu']:.0%}",
                f"{p['days']:.1f}",
                f"{p['chip_hours'] / 1e3:,.0f}k",
            )
        )
        if p.get("not_compiled"):
            notes.append(
                f"\n{where}: {p['not_compiled']} more choices might be faster and were "
                "not compiled"
            )
        notes += [f"\n{where}, unknown: {text}" for text in p["unknown"]]
    return "\n".join([Table(heads, rows).markdown(), *notes])
