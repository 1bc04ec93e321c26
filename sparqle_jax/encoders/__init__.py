"""Speech encoders: waveform -> frames. One file per family."""
