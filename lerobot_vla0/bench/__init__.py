"""`lerobot-vla0 bench`: what the policy costs, beside what the same costs elsewhere, on your machine."""
