"""Measurements that stand behind every figure in the documentation. See README.md in this folder."""
