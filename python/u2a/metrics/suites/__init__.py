"""What `u2a eval` measures of one model: `rows` (forget, retain), `preference` (pa), `membership`
(mia), `tofu`, `muse`."""
