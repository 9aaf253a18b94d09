"""Everything round a training step: fit, export, run folder, logging, preemption, faults."""
