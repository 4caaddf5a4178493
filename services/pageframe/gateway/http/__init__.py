"""The gateway's HTTP door: OpenAI's API, so that existing clients need no change."""
