"""Agreement of ranks over their group's store; nothing here communicates through a collective."""

from fuseplan.distributed.agreement import Agreement, agree, agree_in_groups

__all__ = ["Agreement", "agree", "agree_in_groups"]
