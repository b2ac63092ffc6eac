"""The layouts that every parallel claim is tested in: (processes, layout)."""

LAYOUTS = {
    "tp2": (2, dict(tensor=2)),
    "ep2": (2, dict(expert=2)),
    "tp2_ep2": (2, dict(tensor=2, expert=2)),
    "tp2_ep4": (4, dict(tensor=2, expert=4)),
    "tp4": (4, dict(tensor=4)),
    "tp2_etp2_ep2": (4, dict(tensor=2, expert_tensor=2, expert=2)),
    "dp2_ep2": (4, dict(expert=4 // 2)),
}
