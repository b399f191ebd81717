"""The CPU operators that SGLang 0.5.23 imports from its compiled package `sgl_kernel`, in plain PyTorch.

With SGLANG_USE_CPU_ENGINE=1 SGLang takes its CPU paths and asks this package for a dozen operators. Here they are for
dense models in float32, so that the real server runs wherever PyTorch does: the same arguments and results, no speed.
What is missing (mixture of experts, quantised linears, linear attention, sliding windows) fails by name when SGLang
reaches for it.

    slots        which cache slots belong to which tokens   imported at start; used by speculation
    draft_tree   building and walking trees of drafts       EAGLE, EAGLE-3, STANDALONE; NGRAM (`speculative`)
    attention    attention over the paged cache             --attention-backend intel_amx, which speculation needs
    pinning      pinned memory that is not there            --enable-lora
"""

from . import attention as attention
from . import pinning as pinning
from .draft_tree import build_tree_kernel_efficient_cpu as build_tree_kernel_efficient_cpu
from .draft_tree import verify_tree_greedy_cpu as verify_tree_greedy_cpu
from .slots import assign_draft_cache_locs_contiguous_cpu as assign_draft_cache_locs_contiguous_cpu
from .slots import assign_extend_cache_locs_cpu as assign_extend_cache_locs_cpu
from .slots import assign_req_to_token_pool_cpu as assign_req_to_token_pool_cpu
from .slots import build_draft_decode_metadata_cpu as build_draft_decode_metadata_cpu
from .slots import copy_all_layer_kv_cache_cpu as copy_all_layer_kv_cache_cpu
from .slots import fill_accept_out_cache_loc_cpu as fill_accept_out_cache_loc_cpu
from .slots import fill_bonus_tokens_cpu as fill_bonus_tokens_cpu
from .slots import rotate_input_ids_cpu as rotate_input_ids_cpu

__version__ = "0.4.10"
