"""The paper's tables and figures for one's own runs."""
