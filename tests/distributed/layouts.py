"""The layouts that every parallel claim is tested in: (processes, layout)."""

LAYOUTS = {
    "tp2": (2, dict(tensor=2)),
    "ep2": (2, dict(expert=2)),
    "tp2_ep2": (2, dict(tensor=2, expert=2)),
    "tp2_ep4": (4, dict(tensor=2, expert=4)),
    "tp4": (4, dict(tensor=4)),
    "tp2_etp2_ep2": (4, dict(tensor=2, expert_tensor=2, expert=2)),
    "dp2_ep2": (4, dict(expert=2)),
}
LAYOUTS_BY_SIZE = {
    "base": list(LAYOUTS),
    "deep": ["tp2_ep2", "tp2_ep4", "tp4", "tp2_etp2_ep2"],
    "bigger_canvas": ["tp2_ep2", "tp2_etp2_ep2"],
    "one_global_kv": ["tp2", "tp4"],  # more ranks than key/value heads: each reads its head of a replicated weight
    "odd_vocab": ["tp2_ep2", "tp4"],  # 61 ids padded to 128: under tp4 two of the ranks hold padding alone
}
SIZE_AND_LAYOUT = [(size, layout) for size, layouts in LAYOUTS_BY_SIZE.items() for layout in layouts]
