"""The mixture under the microscope: utilisation, precision, figures, the mixture as a model, monitors."""
