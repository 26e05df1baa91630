"""The one room that touches the kernel. Verbs are named as the kernel names them."""
