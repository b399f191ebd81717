"""Where SGLang's n-gram speculation imports its operator from."""

from .draft_tree import reconstruct_indices_from_tree_mask as reconstruct_indices_from_tree_mask
