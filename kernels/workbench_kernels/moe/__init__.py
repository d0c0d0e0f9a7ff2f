"""A fused mixture-of-experts layer that stays fused while it is observed and intervened on."""
