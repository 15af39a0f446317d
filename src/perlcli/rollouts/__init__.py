"""How completions are sampled: in memory by transformers, or by an engine that an adapter is sent to."""
