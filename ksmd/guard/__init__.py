"""The guard: userfaultfd contexts over merged memory, and the pager that answers for them."""
