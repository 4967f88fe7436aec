"""The guests' C header, made from the table in `layout.py`."""

from __future__ import annotations

from harness.wire import layout

_C = {"u8": "uint8_t", "u16": "uint16_t", "u32": "uint32_t", "u64": "uint64_t"}


def c_header() -> str:
    """The text of `wire.h`: usable from C and, for its constants and offsets, from assembly."""
    lines = ["/* Made from harness/wire/layout.py; do not edit. */", "#ifndef TW_WIRE_H", "#define TW_WIRE_H", ""]
    constants = {
        "TW_PROTOCOL": layout.PROTOCOL,
        "TW_MAGIC": layout.MAGIC,
        "TW_OP_SLOTS": layout.OP_SLOTS,
        "TW_RECORD_SLOTS": layout.RECORD_SLOTS,
        "TW_MAX_PROBES": layout.MAX_PROBES,
        "TW_MAX_DIFFS": layout.MAX_DIFFS,
        "TW_MAILBOX_CODE": layout.MAILBOX_CODE,
        "TW_MAILBOX_REQUEST": layout.MAILBOX_REQUEST,
        "TW_STRING_PORT": layout.STRING_PORT,
        "TW_IMMEDIATE_PORT": layout.IMMEDIATE_PORT,
        "TW_L1_HIGH": layout.L1_HIGH,
        "TW_L1_HIGH_SLOT": layout.L1_HIGH >> 39 & 0x1FF,
        "TW_INTERRUPT_VECTOR": layout.INTERRUPT_VECTOR,
        "TW_VMRUN_RAISED": layout.VMRUN_RAISED,
        "TW_CONTROL_BYTES": layout.CONTROL_BYTES,
        "TW_SAVE_BYTES": layout.SAVE_BYTES,
    }
    for prefix, table in (
        ("TW_OP_", layout.OPS),
        ("TW_HOST_", layout.HOST_REGISTERS),
        ("TW_HOST_MODE_", layout.HOST_MODES),
        ("TW_RECORD_", layout.RECORDS),
        ("TW_PROBE_", layout.PROBES),
        ("TW_REQUEST_", layout.REQUESTS),
        ("TW_STOP_", layout.STOPS),
        ("TW_ANSWER_", layout.ANSWERS),
    ):
        constants |= {prefix + name.upper(): value for name, value in table.items()}
    constants |= {f"TW_FEATURE_{name.upper()}": 1 << bit for bit, name in enumerate(layout.FEATURES)}
    lines += [f"#define {name} {value:#x}" for name, value in constants.items()]
    lines += [f"#define TW_VMLOADED {', '.join(map(hex, layout.VMLOADED.values()))}"]
    for shape in layout.STRUCTS.values():
        short = shape.name.removeprefix("tw_").upper()
        lines += [f"#define TW_AT_{short}_{name.upper()} {offset:#x}" for name, offset in shape.offsets.items()]
        lines.append(f"#define TW_SIZEOF_{short} {shape.size:#x}")
    lines += ["", "#ifndef __ASSEMBLER__", "#include <stdint.h>"]
    for shape in layout.STRUCTS.values():
        lines += ["", f"/* {shape.comment} */", f"struct {shape.name} {{"]
        for field in shape.fields:
            ctype = _C.get(field.type, f"struct {field.type}")
            count = f"[{field.count}]" if field.count > 1 else ""
            lines.append(f"\t{ctype} {field.name}{count};")
        lines += ["};", f'_Static_assert(sizeof(struct {shape.name}) == {shape.size:#x}, "{shape.name}");']
    lines += ["#endif", "#endif", ""]
    return "\n".join(lines)
