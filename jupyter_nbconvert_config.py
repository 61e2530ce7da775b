"README.md is nbs/index.ipynb seen from one folder above (make readme): links to files beside the notebook get the folder's name"
import re
from nbconvert.preprocessors import Preprocessor

class FromAbove(Preprocessor):
    def preprocess_cell(self, cell, resources, index):
        if cell.cell_type == 'markdown': cell.source = re.sub(r'\]\((?!\w+:|#|/)', '](nbs/', cell.source)
        return cell, resources

c.MarkdownExporter.preprocessors = [FromAbove]
